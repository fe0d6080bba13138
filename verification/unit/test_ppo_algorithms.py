import copy
import json
import math

import pytest
import torch
from tiny_models import PROMPTS, VOCABULARY, share_of_sevens, snapshot
from trainer_cases import (
    CRITIC_FREE,
    algorithm_case,
    algorithms,
    gradient_of,
    plan_of,
    rollout_of,
    sequences_alone,
    step_once,
)

from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.metrics import log_row
from rlhf_core.policy import ActorCritic
from rlhf_core.scoring import score_rollout
from rlhf_core.targets import make_targets
from rlhf_core.testing.command import TINY_RUN, run_command
from rlhf_core.trainer_state import load_state, save_state

VALUE_METRICS = {"value_loss", "explained_variance", "value_mean", "return_mean"}
critic_free = pytest.mark.parametrize("algorithm", CRITIC_FREE)


@algorithms
def test_a_step_logs_the_metrics_that_its_algorithm_has_and_its_first_ratio_is_exactly_one(algorithm):
    config, state = algorithm_case(algorithm, steps=2)
    for step in (1, 2):
        metrics = step_once(state, config).metrics
        row = log_row(step, metrics)
        assert row["nonfinite"] == []
        assert VALUE_METRICS & row.keys() == (VALUE_METRICS if algorithm == "ppo" else set())
        assert ("reward_zero_std_frac" in row) == (config.ppo.recipe.group_size > 1)
        assert metrics["ratio_max_dev_first"] == 0.0
        assert metrics["grad_norm"] > 0.0


@critic_free
def test_without_a_critic_there_is_no_value_model_in_memory_nor_in_the_optimizer(algorithm):
    config, state = algorithm_case(algorithm)
    assert config.value_model is None
    assert sum(p.numel() for p in state.model.parameters()) == sum(p.numel() for p in state.model.lm.parameters())
    step_once(state, config)
    assert set(state.optimizer.state) == set(state.model.lm.parameters())


def test_a_model_without_a_value_head_gives_the_logits_of_one_with_it():
    config, state = algorithm_case("grpo")
    rollout = rollout_of(config, state)
    shape = rollout.input_ids_BL, rollout.attention_mask_BL, rollout.response_length
    for value in ("shared", "separate"):
        logits, none = state.model(*shape)
        assert none is None
        assert torch.equal(logits, ActorCritic(state.model.lm, value)(*shape)[0])


@critic_free
def test_the_completions_of_a_prompt_stand_side_by_side_and_differ(algorithm):
    config, state = algorithm_case(algorithm, group_size=4)
    rollout = step_once(state, config).rollout
    rows, responses = rollout.token_ids(), rollout.response_token_ids()
    prompts = [row[: len(row) - len(response)] for row, response in zip(rows, responses, strict=True)]
    assert prompts == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    assert len({tuple(response) for response in responses[:4]}) > 1


# -- the first step against formulas written sequence by sequence ------------------------------------------------------


def advantages_by_hand(algorithm, scores, penalties, k):
    """One list of token advantages a sequence: the papers' formulas in plain numbers."""
    returns = [s - (math.fsum(x) if algorithm == "rloo" else 0.0) for s, x in zip(scores, penalties, strict=True)]
    groups = [returns[at - at % k : at - at % k + k] for at in range(len(returns))]
    means = [math.fsum(group) / k for group in groups]
    if algorithm == "rloo":
        of_each = [r - (m * k - r) / (k - 1) for r, m in zip(returns, means, strict=True)]
    elif algorithm == "grpo":
        spreads = [math.sqrt(math.fsum((r - m) ** 2 for r in g) / (k - 1)) for g, m in zip(groups, means, strict=True)]
        of_each = [(r - m) / (s + 1e-6) for r, m, s in zip(returns, means, spreads, strict=True)]
    else:
        of_each = [r - m for r, m in zip(returns, means, strict=True)]
    found = [[a] * len(x) for a, x in zip(of_each, penalties, strict=True)]
    if algorithm == "reinforce++":
        found = [[s - math.fsum(x[t:]) for t in range(len(x))] for s, x in zip(scores, penalties, strict=True)]
    if algorithm.startswith("reinforce++"):
        flat = [a for row in found for a in row]
        mean = math.fsum(flat) / len(flat)
        deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
        found = [[(a - mean) / deviation for a in row] for row in found]
    return found


def gradient_by_hand(algorithm, state, rollout, rewards, config):
    found, k, beta = sequences_alone(state, rollout), config.ppo.group_size, state.kl_coef
    penalties = [
        [beta * (p - q) for p, q in zip(one["logprobs"].tolist(), one["ref_logprobs"].tolist(), strict=True)]
        for one in found
    ]
    ended = rollout.ended_B.tolist()
    scores = [r - (0.0 if e else config.ppo.missing_eos_penalty) for r, e in zip(rewards.tolist(), ended, strict=True)]
    advantages = advantages_by_hand(algorithm, scores, penalties, k or 1)
    tokens = sum(len(row) for row in advantages)
    loss = 0.0
    for one, row in zip(found, advantages, strict=True):
        logp, ref = one["logprobs"], one["ref_logprobs"].detach()
        x = logp - ref
        losses = -torch.tensor(row, dtype=torch.float64) * logp
        if algorithm == "grpo":
            losses = losses + beta * ((-x).exp() - 1 + x)
        elif algorithm in ("dr-grpo", "reinforce++-baseline"):
            losses = losses + beta * 0.5 * x**2  # what ρ k3 is at ρ = 1, in its gradient
        weight = {"grpo": 1 / (8 * len(row)), "dr-grpo": 1 / (8 * config.sampling.max_new_tokens), "rloo": 1 / 8}
        loss = loss + weight.get(algorithm, 1 / tokens) * losses.sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in found[0]["model"].named_parameters()}


@critic_free
@pytest.mark.parametrize("micro", [8, 2])
def test_the_first_step_follows_the_papers_formulas_written_out(algorithm, micro):
    """With plain gradient descent at rate 1 the weights move by exactly the gradient."""
    settings = {"minibatch_size": 8, "micro_batch_size": micro, "epochs": 1, "learning_rate": 1.0}
    config, state = algorithm_case(algorithm, max_grad_norm=1e9, kl_coef=0.3, **settings)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    before = copy.deepcopy(state)
    result = step_once(state, config)
    expected = gradient_by_hand(algorithm, before, result.rollout, result.rewards_B, config)
    old, moved = snapshot(before.model), snapshot(state.model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        difference = (old[name] - moved[name]).double()
        torch.testing.assert_close(difference, gradient, rtol=0, atol=5e-6 * max(largest, 1.0))


@pytest.mark.parametrize("right", CRITIC_FREE)
def test_the_formulas_of_the_algorithms_can_be_told_apart(right):
    settings = {"minibatch_size": 8, "micro_batch_size": 8, "epochs": 1, "kl_coef": 0.3}
    config, state = algorithm_case(right, **settings)
    rollout = rollout_of(config, state)
    rewards = share_of_sevens(rollout)
    grouped, _ = algorithm_case("rloo", **settings)
    gradients = {name: gradient_by_hand(name, state, rollout, rewards, grouped) for name in CRITIC_FREE}
    for other in set(CRITIC_FREE) - {right}:
        worst = max(float((gradients[right][name] - gradients[other][name]).abs().max()) for name in gradients[right])
        assert worst > 1e-3, other


@critic_free
def test_with_the_penalty_in_the_loss_the_reward_has_none_and_the_other_way_round(algorithm):
    config, state = algorithm_case(algorithm, minibatch_size=8, micro_batch_size=8)
    rollout = rollout_of(config, state)
    scores = score_rollout(state.model, state.reference, rollout, [plan_of(8)], 1.0, "float32")
    flat = torch.zeros_like(scores.logprobs_BT)  # no reward at all: what is left is the penalty
    targets, _ = make_targets(flat, None, rollout.response_mask_BT, config.ppo)
    gradients, _ = gradient_of((config, state, rollout, scores, targets), plan_of(8))
    pulls = max(float(gradient.abs().max()) for gradient in gradients.values()) > 0.0
    assert pulls == (config.ppo.recipe.kl_place == "loss")


# -- through checkpoints and the command line --------------------------------------------------------------------------


@critic_free
def test_a_step_after_a_checkpoint_gives_the_bits_of_a_step_without_it(tmp_path, algorithm):
    config, state = algorithm_case(algorithm)
    step_once(state, config)
    save_state(state, word_tokenizer([f"w{number}" for number in range(VOCABULARY - 3)]), tmp_path)
    assert not (tmp_path / "value.safetensors").exists()
    loaded = load_state(tmp_path, state.reference, config, torch.device("cpu"))
    assert step_once(loaded, config).metrics == step_once(state, config).metrics


@pytest.mark.usefixtures("reviews_drawn_once")
@pytest.mark.parametrize("algorithm", ["grpo", "reinforce++"])
def test_the_command_line_selects_the_algorithm(tmp_path, algorithm):
    options = ("--ppo.algorithm", algorithm, "--ppo.batch-size", "8", "--runs", tmp_path, "--name", "a")
    outcome = run_command("train", *TINY_RUN, *options)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert not any(VALUE_METRICS & row.keys() for row in rows)
    exported = run_command("export", tmp_path / "a", tmp_path / "b")
    assert exported.code == 0, exported.err
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"# A policy trained with {algorithm.upper()}\n" in card
    assert f"- {algorithm}\n" in card


@pytest.mark.usefixtures("reviews_drawn_once")
def test_what_cannot_be_is_refused_in_one_line_before_a_run_is_made(tmp_path):
    for options, word in (
        (("--ppo.kl-place", "loss"), "expectation is zero"),
        (("--ppo.algorithm", "grpo", "--ppo.group-size", "7"), "not divisible by group_size 7"),
        (("--ppo.algorithm", "trpo"), "trpo"),
    ):
        outcome = run_command("train", *options, "--runs", tmp_path)
        assert outcome.code == 2
        assert word in outcome.err
        assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
