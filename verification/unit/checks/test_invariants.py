import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import EOS, PAD, PROMPTS, share_of_sevens, tiny_config, tiny_state

from rlhf_core import ppo, updates
from rlhf_core.checks.gradient_probe import GradientProbe, leaves
from rlhf_core.checks.invariants import target_error, tokens_after_end
from rlhf_core.losses import clipped_policy_losses, clipped_value_losses, log_ratio, masked_sum


def targets(**changes):
    """GAE's hand-worked case of the design (γ = 1, λ = 0.95) with a score of 1 at the end and no KL penalty."""
    given = {
        "rewards_B": np.array([1.5]),
        "ended_B": np.array([False]),
        "missing_eos_penalty": 0.5,
        "logprobs_BT": np.array([[-1.0, 5.0, -2.0]]),
        "ref_logprobs_BT": np.array([[-1.0, 9.0, -2.0]]),
        "values_BT": np.array([[0.5, 7.0, 0.25]]),
        "mask_BT": np.array([[True, False, True]]),
        "kl_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "whiten_advantages": False,
        "raw_advantages_BT": np.array([[0.4625, 0.0, 0.75]]),
        "advantages_BT": np.array([[0.4625, 0.0, 0.75]]),
        "returns_BT": np.array([[0.9625, 0.0, 1.0]]),
    }
    return target_error(**(given | changes))


def test_the_hand_worked_targets_have_no_error():
    assert targets() < 1e-15


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"raw_advantages_BT": np.array([[0.4625, 0.0, 0.9]])}, 0.15 / 0.75),
        ({"returns_BT": np.array([[0.9625, 0.0, 0.7]])}, 0.3 / 0.75),
        ({"advantages_BT": np.array([[0.4625, 0.0, -0.75]])}, 1.5 / 0.75),
        ({"rewards_B": np.array([0.25])}, None),
        ({"ended_B": np.array([True])}, None),
        ({"ref_logprobs_BT": np.array([[-3.0, 9.0, -2.0]])}, None),
        ({"lam": 1.0}, None),
    ],
)
def test_a_target_that_differs_from_its_definition_shows(change, error):
    got = targets(**change)
    assert got > 0.04
    if error is not None:
        assert got == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("garbage", [np.nan, 1e30])
def test_what_lies_outside_the_mask_changes_nothing(garbage):
    names = ("logprobs_BT", "ref_logprobs_BT", "values_BT", "raw_advantages_BT", "advantages_BT", "returns_BT")
    clean = {name: np.array([[0.4, 0.0, 0.75]]) for name in names}
    dirty = {name: np.where([[True, False, True]], array, garbage) for name, array in clean.items()}
    assert targets(**dirty) == targets(**clean)


def test_tokens_behind_the_first_end_of_a_sequence_are_counted():
    ids = np.array([[5, EOS, 6, EOS], [5, 6, 7, EOS], [EOS, 5, 5, 5]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=bool)
    assert tokens_after_end(ids, mask, EOS) == 2
    assert tokens_after_end(ids, np.ones_like(mask), EOS) == 5


def probed(loss_of, *, attached=False):
    """A minibatch in two micro-batches at ratio 1, one with a masked token; the probe's figures under a loss."""
    generator = torch.Generator().manual_seed(1)
    old, advantages, returns = (torch.randn(4, 3, generator=generator) for _ in range(3))
    values_before = torch.randn(4, 3, generator=generator)
    mask = torch.tensor([[True, True, False]] * 4)
    probe, tokens = GradientProbe(mask, 0.5), 8
    for rows in (torch.arange(1), torch.arange(1, 4)):
        leaves = [old[rows].clone().requires_grad_(), values_before[rows].clone().requires_grad_()]
        logprobs, values = (leaf * 1.0 for leaf in leaves)
        a = advantages[rows] + (0.0 * values if attached else 0.0)
        policy = masked_sum(
            clipped_policy_losses(log_ratio(logprobs, old[rows], mask[rows]), a, mask[rows], clip_range=0.2), mask[rows]
        )
        value = masked_sum(
            clipped_value_losses(values, values_before[rows], returns[rows], mask[rows], clip_range=0.2), mask[rows]
        )
        loss = loss_of(policy, value, logprobs, values, advantages[rows]) / tokens
        probe.watch(rows, logprobs, values, a, returns[rows], loss)
        loss.backward()
    return probe.metrics(), advantages, values_before - returns


def right(policy, value, *others):
    return policy + 0.5 * value


def test_the_right_loss_has_the_gradient_of_the_closed_form():
    metrics, advantages, errors = probed(right)
    assert metrics["first_gradient_error"] < 1e-6
    policy = float((advantages[:, :2].double() ** 2).sum())
    value = float(((0.5 * errors[:, :2].double()) ** 2).sum())
    assert metrics["value_gradient_share"] == pytest.approx(value / (policy + value), rel=1e-5)


def test_a_probe_of_the_halves_of_a_minibatch_says_what_one_of_the_whole_does():
    """Where policy and value model have passes of their own, the probe sees log-probs and values one by one."""
    generator = torch.Generator().manual_seed(1)
    start, advantages, before, returns = (torch.randn(4, 3, generator=generator) for _ in range(4))
    mask, rows = torch.tensor([[True, True, False]] * 4), torch.arange(4)

    def figures(halves, left_over=0.0):
        probe = GradientProbe(mask, 0.5)
        weights = [x.clone().requires_grad_() for x in (start, before)]
        weights[1].grad = torch.full_like(before, left_over)
        logprobs, values = (x * 1.0 for x in weights)
        policy = clipped_policy_losses(log_ratio(logprobs, start, mask), advantages, mask, clip_range=0.2).sum() / 8
        value = 0.5 * clipped_value_losses(values, before, returns, mask, clip_range=0.2).sum() / 8
        if halves:
            probe.watch(rows, logprobs, None, advantages, returns, policy)
            policy.backward()
            probe.watch(rows, None, values, advantages, returns, value)
            value.backward()
        else:
            probe.watch(rows, logprobs, values, advantages, returns, policy + value)
            (policy + value).backward()
        return probe.metrics()

    assert figures(halves=True) == figures(halves=False)
    assert figures(halves=True)["first_gradient_error"] < 1e-6
    assert figures(halves=True, left_over=0.1)["first_gradient_error"] == 1.0  # of the value model alone


@pytest.mark.parametrize(
    "wrong",
    [
        lambda policy, value, *_: policy + 50.0 * value,
        lambda policy, value, *_: -policy + 0.5 * value,
        lambda policy, value, *_: 0.5 * policy + 0.5 * value,
        lambda policy, value, *_: policy,
        lambda policy, value, logprobs, values, a: policy + 0.5 * value + 0.1 * values[:, :2].sum(),
        lambda policy, value, logprobs, values, a: policy + 0.5 * value - (logprobs * a)[:, 2].sum(),
    ],
    ids=["value loss × 100", "sign", "scale", "no value loss", "advantages not detached", "padding counted"],
)
def test_a_wrong_loss_has_another_gradient(wrong):
    assert probed(wrong)[0]["first_gradient_error"] > 0.05


def test_targets_that_carry_a_gradient_show_even_where_it_is_zero():
    assert probed(right, attached=True)[0]["first_gradient_error"] == 1.0


def test_a_term_that_goes_past_log_probs_and_values_shows():
    """Such as the entropy, another result of the very function that gives the log-probs, or a norm of the weights."""
    weight = torch.ones((), requires_grad=True)
    assert probed(lambda policy, value, *_: policy + 0.5 * value + 1e-6 * weight)[0]["first_gradient_error"] == 1.0


def test_leaves_are_those_of_the_results_and_not_by_way_of_what_is_left_out():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    first, second = (a * b).unbind()
    assert set(leaves([first + second])) == {a, b}
    assert set(leaves([first + second], without=[first])) == {a, b}
    assert set(leaves([2 * first + second], without=[first, second])) == set()
    assert set(leaves([first + b.sum()], without=[first])) == {b}
    assert set(leaves([a.sum()], without=[a])) == set()


@pytest.mark.parametrize("coef", [0.01, -0.01])
def test_a_bonus_for_entropy_in_the_trainer_is_no_ppo_loss(coef, monkeypatch):
    entropies, evaluate_rows, losses = [], updates.evaluate_rows, updates.clipped_policy_losses

    def stashing(*args):
        found = evaluate_rows(*args)
        entropies[:] = [found[1]]
        return found

    monkeypatch.setattr(updates, "evaluate_rows", stashing)
    monkeypatch.setattr(
        updates, "clipped_policy_losses", lambda *args, **options: losses(*args, **options) - coef * entropies[0]
    )
    config = tiny_config(kl_coef=0.3)
    state = tiny_state("llama", "shared", config, reference_seed=1)
    result = ppo.ppo_step(state, PROMPTS, share_of_sevens, config, eos_id=EOS, pad_id=PAD)
    assert result.metrics["first_gradient_error"] == 1.0


@pytest.mark.parametrize("whiten", [False, True])
def test_a_step_of_the_trainer_keeps_every_invariant(whiten):
    config = tiny_config(whiten_rewards=whiten, whiten_advantages=not whiten, kl_coef=0.3)
    state = tiny_state("llama", "shared", config, reference_seed=1)
    metrics = ppo.ppo_step(state, PROMPTS, share_of_sevens, config, eos_id=EOS, pad_id=PAD).metrics
    assert metrics["target_error"] < 1e-5
    assert metrics["first_gradient_error"] < 1e-5
    assert metrics["tokens_after_eos"] == 0
    assert 0.0 < metrics["value_gradient_share"] < 1.0


def test_gradients_that_are_never_zeroed_show_in_the_next_step():
    config = tiny_config(kl_coef=0.3)
    state = tiny_state("llama", "shared", config, reference_seed=1)
    state.optimizer.zero_grad = lambda *args, **options: None
    first, second = (
        ppo.ppo_step(state, PROMPTS, share_of_sevens, config, eos_id=EOS, pad_id=PAD).metrics["first_gradient_error"]
        for _ in range(2)
    )
    assert first < 1e-5
    assert second == 1.0


def test_a_frozen_policy_has_no_gradient_of_the_closed_form():
    config = tiny_config(kl_coef=0.3)
    state = tiny_state("llama", "separate", config, reference_seed=1)
    state.model.lm.requires_grad_(False)
    metrics = ppo.ppo_step(state, PROMPTS, share_of_sevens, config, eos_id=EOS, pad_id=PAD).metrics
    assert metrics["first_gradient_error"] == 1.0


def test_a_rollout_that_counts_padding_breaks_one(monkeypatch):
    sample = ppo.sample

    def careless(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        return dataclasses.replace(rollout, response_mask_BT=torch.ones_like(rollout.response_mask_BT))

    config = tiny_config(max_new_tokens=12)
    prompts, state = PROMPTS, tiny_state("llama", "shared", config)
    monkeypatch.setattr(ppo, "sample", careless)
    metrics = ppo.ppo_step(state, prompts, share_of_sevens, config, eos_id=EOS, pad_id=PAD).metrics
    assert metrics["tokens_after_eos"] > 0
