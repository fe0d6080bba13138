import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    EOS,
    PAD,
    PROMPTS,
    VALUES,
    draw,
    rows_of,
    same_bits,
    share_of_sevens,
    snapshot,
    tiny_config,
    tiny_state,
)

from rlhf_core import ppo
from rlhf_core.config import PPOConfig, SamplingConfig
from rlhf_core.metrics import BY_NAME, log_row, rollout_metrics
from rlhf_core.ppo import (
    NonFiniteError,
    Scores,
    Targets,
    UpdateStatistics,
    accumulate_gradients,
    evaluate_rows,
    learning_rate,
    make_targets,
    plan_epoch,
    ppo_step,
    score_rollout,
    train,
    update,
)
from rlhf_core.profiling import StageClock
from rlhf_core.rollout import left_pad

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
values = pytest.mark.parametrize("value", VALUES)


def step_once(state, config, reward=share_of_sevens, prompts=PROMPTS):
    return ppo_step(state, prompts[: config.ppo.batch_size], reward, config, eos_id=EOS, pad_id=PAD)


def plan_of(*sizes):
    """One minibatch, its rows in order, in micro-batches of these sizes."""
    return list(torch.arange(sum(sizes)).split(list(sizes)))


# -- the ratio ---------------------------------------------------------------------------------------------------------


@architectures
@values
@pytest.mark.parametrize(("minibatch", "micro"), [(8, 8), (8, 2), (4, 4), (4, 1), (2, 2)])
def test_the_first_ratio_of_every_step_is_exactly_one(architecture, value, minibatch, micro):
    config = tiny_config(minibatch_size=minibatch, micro_batch_size=micro, learning_rate=1e-2, steps=3)
    state = tiny_state(architecture, value, config)
    for _ in range(3):
        metrics = step_once(state, config).metrics
        assert metrics["ratio_max_dev_first"] == 0.0
        assert metrics["approx_kl"] > 0.0  # later minibatches do move


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_first_ratio_is_exactly_one_at_other_temperatures(temperature):
    config = tiny_config(temperature=temperature)
    metrics = step_once(tiny_state("llama", "separate", config), config).metrics
    assert metrics["ratio_max_dev_first"] == 0.0
    assert metrics["rollout_logprob_diff_max"] < 1e-5


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_the_first_deviation_would_show_a_stale_log_prob_anywhere_in_the_first_minibatch(micro_batch):
    config = tiny_config(epochs=1)
    state = tiny_state("gpt2", "shared", config)
    rollout, plan = draw(state.model.lm, PROMPTS, config), plan_epoch(config.ppo, config.seed, 1, 0)
    scores = score_rollout(state, rollout, plan, 1.0, "float32")
    row = int(plan[0][micro_batch][0])
    scores.logprobs_BT[row, 0] -= math.log(1.5)
    targets = Targets(torch.zeros_like(scores.values_BT), scores.values_BT)
    metrics = update(state, rollout, scores, targets, plan, config, 1, StageClock())
    assert metrics["ratio_max_dev_first"] == pytest.approx(0.5, rel=1e-5)


# -- the log-probs -----------------------------------------------------------------------------------------------------


@architectures
@values
def test_scores_are_those_of_each_sequence_alone(architecture, value):
    config = tiny_config()
    state = tiny_state(architecture, value, config, reference_seed=1)
    rollout = draw(state.model.lm, PROMPTS, config)
    scores = score_rollout(state, rollout, plan_epoch(config.ppo, 0, 1, 0), 0.8, "float32")
    for row, one in enumerate(sequences_alone(state, rollout, temperature=0.8)):
        n = len(one["logprobs"])
        for name, got in (
            ("logprobs", scores.logprobs_BT),
            ("entropies", scores.entropies_BT),
            ("values", scores.values_BT),
            ("ref_logprobs", scores.ref_logprobs_BT),
        ):
            torch.testing.assert_close(got[row, :n].double(), one[name].detach(), rtol=0, atol=1e-5)


@architectures
def test_the_sampler_and_the_trainer_agree_on_every_log_prob(architecture):
    config = tiny_config()
    state = tiny_state(architecture, "shared", config)
    for step in range(5):
        rollout = draw(state.model.lm, PROMPTS, config, step=step)
        scores = score_rollout(state, rollout, plan_epoch(config.ppo, 0, 1, 0), 1.0, "float32")
        difference = (scores.logprobs_BT - rollout.sampler_logprobs_BT)[rollout.response_mask_BT]
        assert difference.abs().max() < 1e-5


# -- gradients against an independent implementation -------------------------------------------------------------------


def sequences_alone(state, rollout, temperature=1.0):
    """Per sequence, from a float64 copy and without padding: log-probs, entropies, values, reference log-probs."""
    model, reference = copy.deepcopy(state.model).double(), copy.deepcopy(state.reference).double()
    trunk = model.lm.base_model if model.value_trunk is None else model.value_trunk
    found = []
    for ids, count in rows_of(rollout):
        tokens = torch.tensor([ids])
        logp = (model.lm(input_ids=tokens, use_cache=False).logits[0, -count - 1 : -1] / temperature).log_softmax(-1)
        ref = (reference.lm(input_ids=tokens, use_cache=False).logits[0, -count - 1 : -1] / temperature).log_softmax(-1)
        hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state[0, -count - 1 : -1]
        drawn = tokens[0, -count:, None]
        found.append(
            {
                "logprobs": logp.gather(1, drawn)[:, 0],
                "entropies": -(logp.exp() * logp).sum(-1),
                "values": model.value_head(hidden)[:, 0],
                "ref_logprobs": ref.gather(1, drawn)[:, 0],
                "model": model,
            }
        )
    return found


def policy_gradient_by_hand(state, rollout, rewards, config):
    """REINFORCE with GAE and a least-squares value: what the first step of PPO is, written sequence by sequence."""
    found, settings = sequences_alone(state, rollout), config.ppo
    advantages, returns = [], []
    for one, reward, ended in zip(found, rewards.tolist(), rollout.ended_B.tolist(), strict=True):
        logp, ref, v = (one[name].tolist() for name in ("logprobs", "ref_logprobs", "values"))
        r = [-state.kl_coef * (p - q) for p, q in zip(logp, ref, strict=True)]
        r[-1] += reward - (0.0 if ended else settings.missing_eos_penalty)
        following, a = 0.0, []
        for t in reversed(range(len(r))):
            next_value = v[t + 1] if t + 1 < len(v) else 0.0
            following = r[t] + settings.gamma * next_value - v[t] + settings.gamma * settings.lam * following
            a.insert(0, following)
        advantages.append(a)
        returns.append([x + y for x, y in zip(a, v, strict=True)])
    flat = [x for a in advantages for x in a]
    mean = math.fsum(flat) / len(flat)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    loss = 0.0
    for one, a, g in zip(found, advantages, returns, strict=True):
        whitened = [(x - mean) / deviation for x in a]
        for t in range(len(a)):
            loss = loss - whitened[t] * one["logprobs"][t]
            loss = loss + settings.value_coef * 0.5 * (one["values"][t] - g[t]) ** 2
    model = found[0]["model"]
    (loss / len(flat)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@architectures
@values
@pytest.mark.parametrize("micro", [8, 2])
def test_the_first_step_follows_an_independently_written_policy_gradient(architecture, value, micro):
    """With plain gradient descent at rate 1 the weights move by exactly the gradient."""
    config = tiny_config(
        minibatch_size=8,
        micro_batch_size=micro,
        epochs=1,
        learning_rate=1.0,
        max_grad_norm=1e9,
        gamma=0.97,
        kl_coef=0.3,
    )
    state = tiny_state(architecture, value, config, reference_seed=1)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    before = copy.deepcopy(state)
    result = step_once(state, config)
    expected = policy_gradient_by_hand(before, result.rollout, result.rewards_B, config)
    old, moved = snapshot(before.model), snapshot(state.model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close((old[name] - moved[name]).double(), gradient, rtol=0, atol=3e-6 * max(largest, 1.0))
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in expected.values()))
    assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert result.metrics["policy_loss"] == pytest.approx(0.0, abs=1e-6)  # −mean of whitened advantages at ratio 1


def off_policy_case(architecture, value, double):
    """A minibatch whose ratios are spread around 1, old values away from the new, and lengths that differ."""
    config = tiny_config(minibatch_size=8, micro_batch_size=8)
    state = tiny_state(architecture, value, config)
    rollout = draw(state.model.lm, PROMPTS, config)
    if double:  # transformers' eager attention of Llama takes its softmax in float32, where a padded row is then NaN
        state.model.double()
        for trunk in filter(None, (state.model.lm, state.model.value_trunk)):
            trunk.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        logprobs, entropies, got_values = evaluate_rows(state.model, rollout, torch.arange(8), 1.0, "float32")
    noise = [torch.randn(logprobs.shape, generator=generator, dtype=torch.float64).to(logprobs.dtype) for _ in range(4)]
    scores = Scores(logprobs + 0.3 * noise[0], entropies, got_values + 0.3 * noise[1], logprobs)
    return config, state, rollout, scores, Targets(noise[2], got_values + noise[3])


def gradient_of(case, minibatch):
    config, state, rollout, scores, targets = case
    state.model.zero_grad(set_to_none=True)
    sums, deviation, tokens = accumulate_gradients(state, rollout, scores, targets, minibatch, config)
    return {name: p.grad.clone() for name, p in state.model.named_parameters()}, sums, deviation, tokens


SPLITS = [(4, 4), (1,) * 8, (3, 5), (7, 1), (2, 2, 2, 2)]


@architectures
@values
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_the_gradient_of_a_minibatch_does_not_depend_on_its_split(architecture, value, double):
    case = off_policy_case(architecture, value, double)
    whole, sums, deviation, tokens = gradient_of(case, plan_of(8))
    tolerance = 1e-12 if double else 2e-6
    assert 0.0 < sums[3] < tokens  # some ratios are clipped and some are not
    for split in SPLITS:
        parts, part_sums, part_deviation, part_tokens = gradient_of(case, plan_of(*split))
        for name in whole:
            scale = max(1.0, float(whole[name].abs().max()))
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=tolerance * scale)
        torch.testing.assert_close(part_sums, sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part_deviation, deviation, rtol=1e-5, atol=1e-6)
        assert part_tokens == tokens


def test_dividing_by_the_micro_batchs_own_tokens_would_be_noticed(monkeypatch):
    case = off_policy_case("gpt2", "separate", True)
    minibatch = plan_of(3, 5)
    tokens = [int(case[2].response_mask_BT[rows].sum()) for rows in minibatch]
    assert tokens[0] != tokens[1]
    right = ppo.ppo_policy_loss
    monkeypatch.setattr(
        ppo, "ppo_policy_loss", lambda x, a, mask, *, clip_range: right(x, a, mask, clip_range=clip_range) / mask.sum()
    )
    whole, parts = gradient_of(case, plan_of(8))[0], gradient_of(case, minibatch)[0]
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) > 1e-4


def test_the_sums_of_a_minibatch_agree_with_loops_over_plain_numbers():
    case = off_policy_case("llama", "shared", True)
    _, state, rollout, scores, targets = case
    _, sums, deviation, tokens = gradient_of(case, plan_of(3, 5))
    policy_loss = value_loss = k3 = clipped = count = largest = 0.0
    for row, one in enumerate(sequences_alone(state, rollout)):
        for t, (new, v) in enumerate(zip(one["logprobs"].tolist(), one["values"].tolist(), strict=True)):
            x = new - scores.logprobs_BT[row, t].item()
            rho, a = math.exp(x), targets.advantages_BT[row, t].item()
            old_v, g = scores.values_BT[row, t].item(), targets.returns_BT[row, t].item()
            policy_loss += max(-rho * a, -min(max(rho, 0.8), 1.2) * a)
            value_loss += 0.5 * max((v - g) ** 2, (min(max(v, old_v - 0.2), old_v + 0.2) - g) ** 2)
            k3 += rho - 1 - x
            clipped += abs(rho - 1) > 0.2
            largest = max(largest, abs(rho - 1))
            count += 1
    assert sums.tolist() == pytest.approx([policy_loss, value_loss, k3, clipped], rel=1e-5)
    assert deviation.item() == pytest.approx(largest, rel=1e-6)
    assert tokens == count


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.1])
def test_an_update_takes_one_step_a_minibatch_each_along_its_own_clipped_gradient_alone(max_grad_norm):
    config = tiny_config(learning_rate=0.1, max_grad_norm=max_grad_norm)
    _, state, rollout, scores, targets = off_policy_case("gpt2", "separate", False)
    by_hand = copy.deepcopy(state)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
    plans = [plan_epoch(config.ppo, config.seed, 1, epoch) for epoch in range(2)]
    metrics = update(state, rollout, scores, targets, plans[0], config, 1, StageClock())
    norms = []
    for minibatch in (minibatch for plan in plans for minibatch in plan):
        gradients = gradient_of((config, by_hand, rollout, scores, targets), minibatch)[0]
        norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values())))
        with torch.no_grad():
            for name, parameter in by_hand.model.named_parameters():
                parameter -= 0.1 * min(1.0, max_grad_norm / norms[-1]) * gradients[name]
    assert len(norms) == 4
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-4)
    assert metrics["grad_norm_max"] == pytest.approx(max(norms), rel=1e-4)
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter, by_hand.model.get_parameter(name), rtol=1e-4, atol=1e-5)
        assert parameter.grad is None  # the memory is free during the next rollout


# -- padding and batches -----------------------------------------------------------------------------------------------


def everything_of(state, rollout, config, *, garbage=None):
    """Scores, targets, update and metrics of a rollout; garbage goes into every tensor outside the mask."""
    state, mask = copy.deepcopy(state), rollout.response_mask_BT
    plan = plan_epoch(config.ppo, config.seed, 1, 0)
    scores = score_rollout(state, rollout, plan, 1.0, "float32")
    if garbage is not None:
        for field in dataclasses.fields(scores):
            getattr(scores, field.name)[~mask] = garbage
    rewards = ppo.token_rewards(share_of_sevens(rollout), scores.logprobs_BT, scores.ref_logprobs_BT, mask, kl_coef=0.1)
    targets, raw = make_targets(rewards, scores.values_BT, mask, config.ppo)
    if garbage is not None:
        targets.advantages_BT[~mask] = targets.returns_BT[~mask] = garbage
    metrics = update(state, rollout, scores, targets, plan, config, 1, StageClock()) | rollout_metrics(
        rewards=share_of_sevens(rollout).numpy(),
        scores=share_of_sevens(rollout).numpy(),
        ended=rollout.ended_B.numpy(),
        mask=mask.numpy(),
        logprobs=scores.logprobs_BT.numpy(),
        ref_logprobs=scores.ref_logprobs_BT.numpy(),
        sampler_logprobs=rollout.sampler_logprobs_BT.numpy(),
        entropies=scores.entropies_BT.numpy(),
        values=scores.values_BT.numpy(),
        advantages=raw.numpy(),
        returns=targets.returns_BT.numpy(),
        kl_coef=0.1,
        kl_target=6.0,
    )
    return metrics, snapshot(state.model)


def assert_same_run(first, second):
    assert first[0] == second[0]
    assert all(same_bits(first[1][name], second[1][name]) for name in first[1])


@architectures
@values
def test_the_tokens_under_the_padding_change_no_bit_of_any_metric_or_weight(architecture, value):
    config = tiny_config(learning_rate=1e-2)
    state = tiny_state(architecture, value, config, reference_seed=1)
    rollout = draw(state.model.lm, PROMPTS, config)
    padding = rollout.attention_mask_BL == 0
    assert padding[:, :5].any()
    assert padding[:, 5:].any()
    other = dataclasses.replace(rollout, input_ids_BL=torch.where(padding, 9, rollout.input_ids_BL))
    assert_same_run(everything_of(state, rollout, config), everything_of(state, other, config))


@values
@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_nan_and_huge_numbers_outside_the_mask_change_no_bit_of_any_metric_or_weight(value, garbage):
    config = tiny_config(learning_rate=1e-2, whiten_rewards=True)
    state = tiny_state("gpt2", value, config, reference_seed=1)
    rollout = draw(state.model.lm, PROMPTS, config)
    assert not rollout.response_mask_BT.all()
    assert_same_run(everything_of(state, rollout, config), everything_of(state, rollout, config, garbage=garbage))


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
def test_garbage_outside_the_mask_of_the_scores_changes_no_bit_of_a_whole_step(monkeypatch, garbage):
    config, right = tiny_config(learning_rate=1e-2), ppo.score_rollout

    def run():
        state = tiny_state("llama", "separate", config, reference_seed=1)
        result = step_once(state, config)
        return result.metrics | {"kl of each": result.kl_B.tolist()}, snapshot(state.model)

    def with_garbage(state, rollout, *rest):
        scores = right(state, rollout, *rest)
        for field in dataclasses.fields(scores):
            getattr(scores, field.name)[~rollout.response_mask_BT] = garbage
        return scores

    clean = run()
    monkeypatch.setattr(ppo, "score_rollout", with_garbage)
    assert_same_run(run(), clean)


def padded_more(rollout, left, right):
    """The same sequences with more padding on both sides."""

    def widen(x, before, fill):
        shape = (len(x), before), (len(x), right)
        return torch.cat([x.new_full(shape[0], fill), x, x.new_full(shape[1], fill)], dim=1)

    return dataclasses.replace(
        rollout,
        input_ids_BL=widen(rollout.input_ids_BL, left, PAD),
        attention_mask_BL=widen(rollout.attention_mask_BL, left, 0),
        response_mask_BT=widen(rollout.response_mask_BT, 0, False),
        sampler_logprobs_BT=widen(rollout.sampler_logprobs_BT, 0, 0.0),
    )


@architectures
def test_more_padding_changes_metrics_and_weights_by_rounding_only(architecture):
    config = tiny_config(learning_rate=1e-3)
    state = tiny_state(architecture, "separate", config, reference_seed=1)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1e-3)
    rollout = draw(state.model.lm, PROMPTS, config)
    narrow, wide = (everything_of(state, one, config) for one in (rollout, padded_more(rollout, 3, 4)))
    assert wide[0] == pytest.approx(narrow[0], rel=1e-4, abs=1e-5)
    for name in narrow[1]:
        torch.testing.assert_close(wide[1][name], narrow[1][name], rtol=1e-4, atol=1e-5)


@architectures
def test_the_order_of_the_rows_changes_metrics_and_weights_by_rounding_only(architecture):
    config = tiny_config(minibatch_size=8, micro_batch_size=8)
    state = tiny_state(architecture, "shared", config, reference_seed=1)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1e-3)
    rollout = draw(state.model.lm, PROMPTS, config)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    shuffled = type(rollout)(*(getattr(rollout, field.name)[order] for field in dataclasses.fields(rollout)))
    first, second = (everything_of(state, one, config) for one in (rollout, shuffled))
    assert second[0] == pytest.approx(first[0], rel=1e-4, abs=1e-5)
    for name in first[1]:
        torch.testing.assert_close(second[1][name], first[1][name], rtol=1e-4, atol=1e-5)


@architectures
@values
def test_one_sequence_alone_makes_a_batch(architecture, value):
    config = tiny_config(batch_size=1, minibatch_size=1, micro_batch_size=1)
    result = step_once(tiny_state(architecture, value, config), config)
    assert result.metrics["ratio_max_dev_first"] == 0.0
    assert result.metrics["reward_var"] == 0.0
    assert log_row(1, result.metrics)["nonfinite"] == []


@pytest.mark.parametrize("longest", [1, 9])
def test_responses_of_one_token_and_longer_prompts_train_too(longest):
    config = tiny_config(max_new_tokens=longest, batch_size=4, minibatch_size=2, micro_batch_size=1)
    prompts = [[2] * 20, [3], [4] * 7, [5, 6]]
    metrics = step_once(tiny_state("llama", "separate", config), config, prompts=prompts).metrics
    assert metrics["ratio_max_dev_first"] == 0.0
    assert 1.0 <= metrics["response_length_mean"] <= longest
    assert log_row(1, metrics)["nonfinite"] == []


# -- rewards, targets, schedules ---------------------------------------------------------------------------------------

REWARDS = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
VALUES_OF_DESIGN = torch.tensor([[0.5, 0.25, 100.0], [0.5, 7.0, 0.25]])
MASK = torch.tensor([[True, True, False], [True, False, True]])
PLAIN = PPOConfig(gamma=1.0, lam=0.95, whiten_advantages=False)


def test_targets_are_the_literal_numbers_of_the_design():
    targets, raw = make_targets(REWARDS, VALUES_OF_DESIGN, MASK, PLAIN)
    torch.testing.assert_close(raw, torch.tensor([[0.4625, 0.75, 0.0], [0.4625, 0.0, 0.75]]))
    torch.testing.assert_close(targets.returns_BT, torch.tensor([[0.9625, 1.0, 0.0], [0.9625, 0.0, 1.0]]))
    assert same_bits(targets.advantages_BT, raw)


def test_advantages_are_whitened_over_the_mask_of_the_whole_batch_and_returns_are_not():
    targets, raw = make_targets(REWARDS, VALUES_OF_DESIGN, MASK, dataclasses.replace(PLAIN, whiten_advantages=True))
    scaled = 0.14375 / math.sqrt(0.14375**2 + 1e-8)  # the four lie 0.14375 on either side of their mean 0.60625
    torch.testing.assert_close(targets.advantages_BT, scaled * torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]))
    torch.testing.assert_close(raw[MASK].mean(), torch.tensor(0.60625))
    torch.testing.assert_close(targets.returns_BT[0], torch.tensor([0.9625, 1.0, 0.0]))


def test_rewards_are_scaled_to_variance_one_with_their_mean_kept():
    config = dataclasses.replace(PLAIN, whiten_rewards=True, lam=1.0)
    _, raw = make_targets(REWARDS, torch.zeros(2, 3), MASK, config)
    # rewards 0, 1, 0, 1: mean ½, deviation ½, so they become −½ and 1½; with λ = 1 and V = 0 advantages are their sums
    torch.testing.assert_close(raw, torch.tensor([[1.0, 1.5, 0.0], [1.0, 0.0, 1.5]]), rtol=1e-6, atol=1e-6)


def test_the_rate_falls_linearly_or_stays():
    linear = PPOConfig(steps=4, learning_rate=0.8, schedule="linear")
    assert [learning_rate(linear, step) for step in (1, 2, 3, 4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert learning_rate(dataclasses.replace(linear, schedule="constant"), 4) == 0.8


def test_the_step_sets_and_logs_the_rate():
    config = tiny_config(learning_rate=1e-3, steps=4)
    state = tiny_state("gpt2", "shared", config)
    rates = [step_once(state, config).metrics["lr"] for _ in range(2)]
    assert rates == pytest.approx([1e-3, 7.5e-4])
    assert state.optimizer.param_groups[0]["lr"] == rates[1]


def test_an_epoch_has_every_row_once_and_is_a_function_of_seed_step_and_epoch():
    config = PPOConfig(batch_size=12, minibatch_size=6, micro_batch_size=3)

    def rows(*key):
        plan = plan_epoch(config, *key)
        assert [[len(micro) for micro in minibatch] for minibatch in plan] == [[3, 3], [3, 3]]
        return torch.cat([torch.cat(minibatch) for minibatch in plan]).tolist()

    keys = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    orders = [rows(*key) for key in keys]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert rows(0, 1, 0) == orders[0]


def test_each_epoch_of_a_step_goes_through_its_own_plan_once(monkeypatch):
    config = tiny_config(epochs=3)
    seen, right = [], ppo.accumulate_gradients

    def spy(state, rollout, scores, targets, minibatch, *others):
        seen.append([rows.tolist() for rows in minibatch])
        return right(state, rollout, scores, targets, minibatch, *others)

    monkeypatch.setattr(ppo, "accumulate_gradients", spy)
    step_once(tiny_state("gpt2", "shared", config), config)
    plans = [plan_epoch(config.ppo, config.seed, 1, epoch) for epoch in range(3)]
    assert seen == [[rows.tolist() for rows in minibatch] for plan in plans for minibatch in plan]
    assert len({str(seen[at : at + 2]) for at in (0, 2, 4)}) == 3


def test_statistics_are_means_over_tokens_and_the_first_deviation():
    statistics = UpdateStatistics()
    statistics.add(torch.tensor([2.0, 4.0, 1.0, 3.0]), torch.tensor(0.25), 4, 1.0)
    statistics.add(torch.tensor([1.0, 2.0, 0.5, 0.0]), torch.tensor(9.0), 2, 4.0)
    assert statistics.metrics() == {
        "policy_loss": 0.5,
        "value_loss": 1.0,
        "approx_kl": 0.25,
        "clip_frac": 0.5,
        "ratio_max_dev_first": 0.25,
        "grad_norm": 2.5,
        "grad_norm_max": 4.0,
    }


def test_the_kl_coefficient_of_a_step_is_logged_and_the_next_one_follows_the_measured_kl():
    config = tiny_config(kl_coef=0.2, kl_target=0.5, kl_horizon=100)
    state = tiny_state("gpt2", "shared", config, reference_seed=1)
    first = step_once(state, config).metrics
    assert first["kl_coef"] == 0.2
    error = min(max(first["kl"] / 0.5 - 1, -0.2), 0.2)
    assert state.kl_coef == pytest.approx(0.2 * (1 + error * 8 / 100), rel=1e-12)
    assert error != 0
    following = state.kl_coef
    assert step_once(state, config).metrics["kl_coef"] == following


def test_a_fixed_kl_coefficient_stays():
    config = tiny_config(kl_coef=0.2, kl_control="fixed")
    state = tiny_state("gpt2", "shared", config, reference_seed=1)
    step_once(state, config)
    assert state.kl_coef == 0.2


def test_kl_rewards_and_the_penalty_for_a_missing_end_are_those_of_each_sequence():
    config = tiny_config(missing_eos_penalty=0.75)
    state = tiny_state("llama", "separate", config, reference_seed=1)
    before = copy.deepcopy(state)
    result = step_once(state, config)
    kls = [
        float((one["logprobs"] - one["ref_logprobs"]).sum().detach()) for one in sequences_alone(before, result.rollout)
    ]
    assert result.kl_B.tolist() == pytest.approx(kls, abs=1e-5)
    assert result.metrics["kl"] == pytest.approx(sum(kls) / 8, abs=1e-5)
    assert result.metrics["reward_mean"] == pytest.approx(float(result.rewards_B.mean()), rel=1e-6)
    unended = 8 - int(result.rollout.ended_B.sum())
    assert unended > 0
    expected = float(result.rewards_B.mean()) - 0.75 * unended / 8
    assert result.metrics["score_mean"] == pytest.approx(expected, rel=1e-5)


# -- the whole step ----------------------------------------------------------------------------------------------------


@architectures
@values
def test_a_step_gives_every_metric_of_the_table_and_times_every_stage(architecture, value):
    config = tiny_config()
    result = step_once(tiny_state(architecture, value, config), config)
    assert result.metrics.keys() == BY_NAME.keys()
    assert log_row(1, result.metrics)["nonfinite"] == []
    stages = {"rollout", "reward", "reference_and_value", "advantages", "update", "metrics"}
    assert stages | {"update/forward_backward", "update/optimizer"} == result.clock.seconds.keys()


def test_a_step_draws_nothing_from_torchs_generator_and_repeats_bit_for_bit():
    config = tiny_config(learning_rate=1e-2)
    runs = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = tiny_state("llama", "separate", config)
            before = torch.get_rng_state()
            metrics = [step_once(state, config).metrics for _ in range(2)]
            assert same_bits(torch.get_rng_state(), before)
        runs.append((metrics, snapshot(state.model)))
    assert_same_run(*runs)


def test_dropout_in_the_models_configuration_stays_off():
    with_dropout, without = tiny_config(), tiny_config()
    runs = []
    for config, rate in ((with_dropout, 0.5), (without, 0.0)):
        state = tiny_state("gpt2", "separate", config, dropout=rate)
        drops = [module.p for module in state.model.modules() if isinstance(module, torch.nn.Dropout)]
        assert drops
        assert set(drops) == {rate}
        metrics = step_once(state, config).metrics
        assert not any(module.training for module in state.model.modules())
        runs.append((metrics, snapshot(state.model)))
    assert_same_run(*runs)


def test_training_goes_on_after_the_last_step_done_and_asks_for_that_steps_prompts():
    config = tiny_config(steps=4)
    state, asked = tiny_state("gpt2", "shared", config), []
    state.step = 2

    def prompts_of_step(step):
        asked.append(step)
        return PROMPTS

    results = list(train(state, prompts_of_step, share_of_sevens, config, eos_id=EOS, pad_id=PAD))
    assert asked == [3, 4]
    assert len(results) == 2
    assert state.step == 4


def test_completions_of_a_step_change_with_the_step():
    config = tiny_config(learning_rate=1e-9)
    state = tiny_state("gpt2", "shared", config)
    first, second = (step_once(state, config).rollout.response_token_ids() for _ in range(2))
    assert first != second


def test_greedy_sampling_in_the_configuration_makes_the_completions_of_all_steps_the_same():
    config = dataclasses.replace(tiny_config(learning_rate=1e-9), sampling=SamplingConfig(max_new_tokens=3, top_k=1))
    state = tiny_state("gpt2", "shared", config)
    first, second = (step_once(state, config).rollout.response_token_ids() for _ in range(2))
    assert first == second
    assert max(map(len, first)) <= 3


def test_the_reference_never_moves():
    config = tiny_config(learning_rate=1e-2)
    state = tiny_state("gpt2", "shared", config)
    before = snapshot(state.reference)
    step_once(state, config)
    assert all(same_bits(before[name], tensor) for name, tensor in state.reference.state_dict().items())
    assert all(parameter.grad is None for parameter in state.reference.parameters())


@architectures
@values
def test_bfloat16_stays_near_float32_and_keeps_weights_and_losses_in_float32(architecture, value):
    config = tiny_config(dtype="bfloat16", temperature=2.0)
    state = tiny_state(architecture, value, config, reference_seed=1)
    rollout, plan = draw(state.model.lm, PROMPTS, config), plan_epoch(config.ppo, 0, 1, 0)
    exact, rough = (score_rollout(state, rollout, plan, 2.0, dtype) for dtype in ("float32", "bfloat16"))
    for field in dataclasses.fields(exact):
        a, b = getattr(exact, field.name), getattr(rough, field.name)
        assert b.dtype == torch.float32
        assert 0 < (a - b)[rollout.response_mask_BT].abs().max() < 0.15
    metrics = step_once(state, config).metrics
    assert metrics["ratio_max_dev_first"] == 0.0
    assert metrics["rollout_logprob_diff_max"] < 0.15
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def assert_stops(state, config, name, reward=share_of_sevens):
    before, done = snapshot(state.model), state.step
    with pytest.raises(NonFiniteError, match=rf"^step {done + 1}: {name} is not finite") as raised:
        step_once(state, config, reward)
    assert isinstance(raised.value, FloatingPointError)
    assert "\n" not in str(raised.value)
    assert all(same_bits(before[key], tensor) for key, tensor in state.model.state_dict().items())
    assert state.step == done


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_stops_the_step_before_the_weights_change(bad):
    config = tiny_config()
    state = tiny_state("gpt2", "shared", config)
    step_once(state, config)

    def reward(rollout):
        scores = share_of_sevens(rollout)
        scores[3] = bad
        return scores

    assert_stops(state, config, "reward", reward)


@architectures
@values
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_at_the_start_of_the_step(architecture, value, bad):
    config = tiny_config()
    state = tiny_state(architecture, value, config)
    name, parameter = list(state.model.named_parameters())[7]
    with torch.no_grad():
        parameter.view(-1)[1] = bad
    assert_stops(state, config, name.replace(".", r"\."))


def test_a_broken_reference_is_named():
    config = tiny_config()
    state = tiny_state("gpt2", "shared", config)
    state.reference.lm.transformer.wte.weight.fill_(math.nan)
    assert_stops(state, config, "ref_logprobs")


@pytest.mark.parametrize("value_coef", [0.5, 0.0])  # without weight it is in no gradient, and still in the log
def test_a_loss_that_explodes_is_named(value_coef):
    config = tiny_config(value_coef=value_coef)
    state = tiny_state("gpt2", "shared", config)
    assert_stops(state, config, "value_loss", lambda rollout: torch.full((8,), 1e30))


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter():
    config = tiny_config()
    state = tiny_state("llama", "separate", config)
    state.model.value_trunk.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    assert_stops(state, config, r"the gradient of value_trunk\.norm\.weight")


def test_weights_that_an_update_drives_to_infinity_are_named_before_anything_is_saved():
    config = tiny_config(minibatch_size=8, micro_batch_size=8, epochs=1, learning_rate=1e39)
    state = tiny_state("gpt2", "shared", config)
    with pytest.raises(NonFiniteError, match=r"^step 1: lm\.transformer\.\S+ is not finite"):
        step_once(state, config)
    assert state.step == 0


@pytest.mark.parametrize("shape", [(8, 1), (7,), (1,), ()])
def test_a_reward_of_the_wrong_shape_is_refused(shape):
    config = tiny_config()
    with pytest.raises(ValueError, match="one score a prompt"):
        step_once(tiny_state("gpt2", "shared", config), config, lambda rollout: torch.zeros(shape))


def test_a_reward_with_a_gradient_or_of_whole_numbers_is_taken():
    config = tiny_config()
    for scores in (torch.ones(8, requires_grad=True), torch.ones(8, dtype=torch.int64)):
        result = step_once(tiny_state("gpt2", "shared", config), config, lambda rollout, scores=scores: scores)
        assert result.metrics["reward_mean"] == 1.0


@pytest.mark.parametrize("n", [7, 9])
def test_another_number_of_prompts_than_the_batch_size_is_refused(n):
    config = tiny_config()
    with pytest.raises(ValueError, match=f"{n} prompts; ppo.batch_size is 8"):
        ppo_step(
            tiny_state("gpt2", "shared", config), (PROMPTS * 2)[:n], share_of_sevens, config, eos_id=EOS, pad_id=PAD
        )


# -- it learns ---------------------------------------------------------------------------------------------------------


def next_token_distribution(lm, prompt):
    ids, _ = left_pad([prompt], PAD)
    with torch.no_grad():
        return lm(input_ids=ids).logits[0, -1].double().softmax(-1)


def bandit(architecture, value, score_of_token, steps, **settings):
    """Prompts of one kind, responses of one token: the policy's whole behaviour is one distribution."""
    config = tiny_config(
        max_new_tokens=1, batch_size=64, minibatch_size=32, micro_batch_size=32, epochs=4, steps=steps,
        missing_eos_penalty=0.0, kl_control="fixed", **settings,
    )  # fmt: skip
    state = tiny_state(architecture, value, config, vocabulary=5)
    start = next_token_distribution(state.reference.lm, [2])
    scores = torch.tensor(score_of_token)

    def reward(rollout):
        return scores[rollout.response_ids_BT[:, 0]]

    for _ in train(state, lambda step: [[2]] * 64, reward, config, eos_id=EOS, pad_id=PAD):
        pass
    return start, next_token_distribution(state.model.lm, [2])


@architectures
@values
def test_ppo_makes_the_one_rewarded_token_likely(architecture, value):
    start, end = bandit(architecture, value, [0.0, 0.0, 0.0, 1.0, 0.0], 12, learning_rate=1e-2, kl_coef=0.0)
    assert start[3] < 0.5
    assert end[3] > 0.9


@architectures
def test_ppo_with_a_kl_penalty_reaches_the_optimum_that_is_known_in_closed_form(architecture):
    """The maximum of E[r] − β KL(π‖π_ref) is π* ∝ π_ref exp(r/β)."""
    scores, beta = [0.0, 0.3, -0.2, 0.5, 0.1], 0.5
    start, end = bandit(
        architecture, "separate", scores, 50, learning_rate=1e-2, kl_coef=beta, whiten_advantages=False, value_coef=1.0
    )
    optimum = start * torch.exp(torch.tensor(scores, dtype=torch.float64) / beta)
    optimum /= optimum.sum()

    def kl(p):
        return float((p * (p / optimum).log()).sum())

    assert kl(start) > 0.05
    assert kl(end) < 0.1 * kl(start)
    assert np.abs((end - optimum).numpy()).max() < 0.05
