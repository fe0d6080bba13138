import copy
import math

import pytest
import torch
from tiny_models import snapshot, tiny_config, tiny_state
from trainer_cases import (
    architectures,
    gradient_of,
    off_policy_case,
    plan_of,
    sequences_alone,
    step_once,
    values,
)

from rlhf_core import updates
from rlhf_core.layers import exchange_layers
from rlhf_core.profiling import StageClock
from rlhf_core.updates import plan_epoch, update
from rlhf_kernels import memory
from rlhf_kernels.products import available


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
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


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


def test_dividing_by_the_micro_batchs_own_tokens_would_be_noticed(monkeypatch):
    case = off_policy_case("gpt2", "separate", True)
    minibatch = plan_of(3, 5)
    tokens = [int(case[2].response_mask_BT[rows].sum()) for rows in minibatch]
    assert tokens[0] != tokens[1]
    right = updates.loss_sum
    monkeypatch.setattr(updates, "loss_sum", lambda losses, mask, mean: right(losses, mask, mean) / mask.sum())
    whole, parts = gradient_of(case, plan_of(8))[0], gradient_of(case, minibatch)[0]
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) > 1e-4


def test_the_sums_of_a_minibatch_agree_with_loops_over_plain_numbers():
    case = off_policy_case("llama", "shared", True)
    _, state, rollout, scores, targets = case
    _, added = gradient_of(case, plan_of(3, 5))
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
    assert added.sums.tolist() == pytest.approx([policy_loss, value_loss, k3, clipped], rel=1e-5)
    assert added.deviation.item() == pytest.approx(largest, rel=1e-6)
    assert (added.tokens, added.count) == (count, count)


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
                if parameter.requires_grad:
                    parameter -= 0.1 * min(1.0, max_grad_norm / norms[-1]) * gradients[name]
    assert len(norms) == 4
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-4)
    assert metrics["grad_norm_max"] == pytest.approx(max(norms), rel=1e-4)
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter, by_hand.model.get_parameter(name), rtol=1e-4, atol=1e-5)
        assert parameter.grad is None  # the memory is free during the next rollout


def passes_of(value, monkeypatch):
    """The passes of a minibatch of one micro-batch, in their order."""
    config, state, rollout, scores, targets = off_policy_case("gpt2", value, double=False)
    events, right = [], updates.evaluate_rows

    def noting(*args):
        found = right(*args)
        for name, x in zip(("policy", "entropy", "value"), found, strict=True):
            if x is not None and x.requires_grad and name != "entropy":
                events.append(f"{name} forward")
                x.register_hook(lambda grad, name=name: events.append(f"{name} backward"))
        return found

    monkeypatch.setattr(updates, "evaluate_rows", noting)
    updates.accumulate_gradients(state, rollout, scores, targets, [torch.arange(8)], config, StageClock(1))
    return events


@values
def test_a_value_model_of_its_own_has_its_passes_when_the_policys_are_over(value, monkeypatch):
    """So that what is kept for the backward pass is kept for one of them at a time."""
    monkeypatch.setattr(updates, "keeps_little", lambda *shape: False)
    events = passes_of(value, monkeypatch)
    if value == "separate":
        assert events == ["policy forward", "policy backward", "value forward", "value backward"]
    else:
        assert events[:2] == ["policy forward", "value forward"]
        assert sorted(events[2:]) == ["policy backward", "value backward"]


@values
def test_passes_that_keep_little_share_the_threads(value, monkeypatch):
    monkeypatch.setattr(updates, "workers", lambda device: 2)
    events = passes_of(value, monkeypatch)
    assert sorted(events[:2]) == ["policy forward", "value forward"]
    assert sorted(events[2:]) == ["policy backward", "value backward"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_order_of_passes_changes_no_bit(micro_batches, monkeypatch):
    found = []
    for little, at_once in ((False, 1), (False, 3), (True, 3), (True, 8)):
        config, state, rollout, scores, targets = off_policy_case("gpt2", "separate", double=False)
        monkeypatch.setattr(updates, "keeps_little", lambda *shape, little=little: little)
        monkeypatch.setattr(updates, "workers", lambda device, at_once=at_once: at_once)
        minibatch = list(torch.arange(8).chunk(micro_batches))
        sums = updates.accumulate_gradients(state, rollout, scores, targets, minibatch, config, StageClock(1))
        found.append([sums.sums, *(parameter.grad for parameter in state.model.parameters())])
    for other in found[1:]:
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.skipif(not available(), reason="no native products on this processor")
def test_a_minibatch_asks_for_no_memory_that_the_one_before_had(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1)
    new, made, of_minibatch = memory.output, [], []
    monkeypatch.setattr(memory, "output", lambda *what: made.append(what) or new(*what))
    accumulate = updates.accumulate_gradients

    def counted(*args):
        before = len(made)
        sums = accumulate(*args)
        of_minibatch.append(len(made) - before)
        return sums

    monkeypatch.setattr(updates, "accumulate_gradients", counted)
    config, state, rollout, scores, targets = off_policy_case("gpt2", "separate", False)
    exchange_layers(state.model)
    update(state, rollout, scores, targets, plan_epoch(config.ppo, config.seed, 1, 0), config, 1, StageClock())
    assert of_minibatch[0] > 20
    assert of_minibatch[1:] == [0] * (config.ppo.epochs - 1)
