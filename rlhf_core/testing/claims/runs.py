"""Epochs, the course of a run, its log, and everything at once.

Properties of a trainer, in the order of :mod:`rlhf_core.testing.properties`; the docstring of each is its claim.
"""

import math

import torch

from rlhf_core.testing.case import Outcome, Trainer, random_case
from rlhf_core.testing.oracle import oracle_trainer
from rlhf_core.testing.readings import (
    TOLERANCE,
    WORLD,
    ask_each,
    close,
    full_case,
    parallel,
    policy_change,
    rounding,
    short_case,
    value_change,
    without_values,
)
from rlhf_core.testing.world import World, gradient, objective, sequence_logprobs


def clipping(trainer: Trainer) -> None:
    """A ratio that left its range by its own advantage stops, the others go on."""
    # Two prompts of two responses each that share their first prefix: one is reinforced, which makes the other's ratio
    # fall; the four cases are a positive and a negative advantage whose ratio rose and fell.
    responses = ((1, 3, 2), (2, 2, 3), (1, 3, 2), (2, 2, 3))
    case = random_case(WORLD, (1, 1, 2, 2), responses, (4.0, 0.5, -4.0, -0.5))
    for clip_range in (0.1, 0.4):
        settings = {"epochs": 2, "learning_rate": 12.0, "clip_range": clip_range}
        within = without_values(case).change(settings=settings)
        close(policy_change(within, trainer), policy_change(within, oracle_trainer))


def value_clipping(trainer: Trainer) -> None:
    """A value that left its range stops, unless it is farther from its return than the clipped one."""
    # A step goes 16/9 of the way to the return. Of the first two rows the value is then farther from it than the
    # clipped one, and comes back; of the third it is nearer, and stays.
    case = full_case(epochs=3, learning_rate=2.0, value_coef=8.0, value_clip_range=0.25, clip_range=0.999)
    case = without_values(case).change(scores=(0.1875, -0.75, 2.5))
    close(value_change(case, trainer), value_change(case, oracle_trainer))


def epochs(trainer: Trainer) -> None:
    """Later epochs keep the advantages and the log-probs of the rollout."""
    case = full_case(epochs=3, learning_rate=0.25, clip_range=0.5, lam=0.5, kl_coef=0.5)
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def dropout(trainer: Trainer) -> None:
    """Dropout stays off, in the reference too."""
    case = without_values(full_case(epochs=2, kl_coef=0.5))
    close(trainer(case.change(dropout=0.5)).policy_SV, trainer(case).policy_SV)


def schedule(trainer: Trainer) -> None:
    """The learning rate falls linearly from its full value."""
    case = without_values(full_case(steps=4, schedule="linear", learning_rate=0.5))
    close(policy_change(case, trainer).norm(), policy_change(case, oracle_trainer).norm())


def reference(trainer: Trainer) -> None:
    """The reference never moves."""
    outcome = trainer(full_case(steps=2, kl_coef=0.5))
    moved = float((outcome.reference_SV - full_case().reference_SV).abs().max())
    assert moved == 0.0, f"the reference's table changed by up to {moved:.3g}{rounding(moved)}"


def adaptive_kl(trainer: Trainer) -> None:
    """The KL coefficient follows its target, in proportion where that is near, and the next step takes it."""
    for target in (0.01, 100.0, 1.125, 1.375):  # the KL is 1.2 in the first step
        case = full_case(kl_coef=0.5, kl_control="adaptive", kl_target=target, kl_horizon=30, steps=2)
        found, expected = trainer(case), oracle_trainer(case)
        close(found.kl_coef, expected.kl_coef)
        close(found.policy_SV, expected.policy_SV)


def expected_gradient(trainer: Trainer) -> None:
    """The expected gradient is the gradient of E[r] − β KL."""
    world = World(vocabulary=3, length=3, prompts=((2,),))
    beta = 0.5
    scores = torch.tensor([((7 * row) % 16) / 8 - 1 for row in range(len(world.responses))], dtype=torch.float64)
    base = random_case(world, (0,), (world.responses[0],), (0.0,), kl_coef=beta)
    policy, reference = base.policy(), base.reference()
    logp_N = sequence_logprobs(world, policy, 0)
    exact = gradient(objective(logp_N, sequence_logprobs(world, reference, 0).detach(), scores, beta=beta), policy)
    expected_SV = torch.zeros_like(base.policy_SV)
    for response, score, logp in zip(world.responses, scores.tolist(), logp_N.tolist(), strict=True):
        case = base.change(responses=(response,), scores=(score,))
        # Of one response alone, the loss divides by its number of tokens, which is as random as the response.
        expected_SV += math.exp(logp) * len(response) * policy_change(case, trainer)
    close(expected_SV, exact["table"])


ROLLOUT = (
    *("kl", "kl_k3", "kl_coef", "entropy", "reward_mean", "reward_var"),
    *("adv_var", "value_mean", "return_mean", "explained_variance", "response_length_mean", "eos_rate"),
)
UPDATE = ("policy_loss", "value_loss", "approx_kl", "clip_frac", "grad_norm", "grad_norm_max")


def _logged(outcome: Outcome, expected: Outcome, names: tuple[str, ...]) -> None:
    """Compare what is logged; what is not is refused afterwards."""
    for name in names:
        if name in outcome.metrics:
            found, wanted = float(outcome.metrics[name]), float(expected.metrics[name])
            off, scale = abs(found - wanted), max(1.0, abs(wanted))
            assert off <= TOLERANCE * scale, f"{name} is {found:.9g}, not {wanted:.9g}{rounding(off, scale)}"
    missing = [name for name in names if name not in outcome.metrics]
    if missing:
        raise NotImplementedError(f"not logged: {', '.join(missing)}")


def rollout_log(trainer: Trainer) -> None:
    """The log of a step says what was measured on its rollout."""
    case = short_case(kl_coef=0.5, lam=0.5, gamma=0.75).change(temperature=0.75)
    first = trainer(case)
    second = trainer(case.change(settings={"steps": 2}))
    anew = trainer(case.change(policy_SV=first.policy_SV.double(), values_S=first.values_S.double()))
    # The second step logs what a run logs that begins where the first step ended.
    _logged(second, anew, tuple(name for name in (*ROLLOUT, *UPDATE) if name in anew.metrics))
    _logged(first, oracle_trainer(case), ROLLOUT)


def update_log(trainer: Trainer) -> None:
    """The log says what the update did: means over the tokens of unequal minibatches, norms before clipping."""
    # So fast that ratios leave their range.
    fast = short_case(kl_coef=0.5, lam=0.5, epochs=2, learning_rate=2.0, minibatch_size=1)
    # One update: trainers may differ in where clipping leads, by torch's 1e-6.
    clipped = short_case(kl_coef=0.5, lam=0.5, max_grad_norm=0.125)
    ask_each(lambda case: _logged(trainer(case), oracle_trainer(case), UPDATE), (fast, clipped))


def whole(trainer: Trainer) -> None:
    """A whole step is the oracle's."""
    case = short_case(
        steps=2, epochs=3, learning_rate=0.25, schedule="linear", gamma=0.75, lam=0.5, kl_coef=0.5,
        whiten_advantages=True, whiten_rewards=True, missing_eos_penalty=0.5, value_clip_range=0.25, max_grad_norm=1.0,
        micro_batch_size=1,
    ).change(temperature=0.75)  # fmt: skip
    found, expected = trainer(case), oracle_trainer(case)
    close(found.policy_SV, expected.policy_SV)
    close(found.values_S, expected.values_S)
