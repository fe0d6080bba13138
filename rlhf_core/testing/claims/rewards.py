"""Rewards, advantages, returns, values and whitening.

Properties of a trainer, in the order of :mod:`rlhf_core.testing.properties`; the docstring of each is its claim.
"""

import torch
from torch import Tensor

from rlhf_core.testing.case import Case, Trainer, random_case
from rlhf_core.testing.oracle import oracle_trainer
from rlhf_core.testing.readings import (
    SCORES,
    WORLD,
    close,
    full_case,
    parallel,
    policy_change,
    read_advantages,
    read_flat,
    rows,
    short_case,
    value_change,
    without_kl,
    without_values,
)


def _kl_case() -> Case:
    return without_values(full_case(gamma=0.0, lam=0.0, kl_coef=0.5)).change(scores=(0.0, 0.0, 0.0))


def kl_direction(trainer: Trainer) -> None:
    """The KL penalty pulls towards the reference."""
    case = _kl_case()
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def kl_size(trainer: Trainer) -> None:
    """The KL coefficient is applied once."""
    with_kl, score_only = _kl_case(), without_kl(_kl_case()).change(scores=SCORES[:3])
    sizes = [float(policy_change(case, trainer).norm()) for case in (with_kl, score_only)]
    expected = [float(policy_change(case, oracle_trainer).norm()) for case in (with_kl, score_only)]
    close(sizes[0] / sizes[1], expected[0] / expected[1])


def kl_temperature(trainer: Trainer) -> None:
    """The KL penalty compares the two policies at the sampling temperature."""
    case = _kl_case().change(temperature=0.5)
    parallel(read_flat(case, trainer), read_flat(case, oracle_trainer))


def missing_eos(trainer: Trainer) -> None:
    """A response that was cut pays the penalty, an ended one does not."""
    case = without_values(random_case(WORLD, (1, 2, 3), ((1, 3, 0), (2, 2, 3), (3, 1, 1)), (1.0, -0.75, 2.5)))
    case = case.change(settings={"missing_eos_penalty": 0.5})
    sizes = [row[-1] for row in read_advantages(case, policy_change(case, trainer))]
    parallel(sizes, [1.0, -1.25, 2.0])


def gamma_and_lambda(trainer: Trainer) -> None:
    """Γ and λ are in their places."""
    case = full_case(gamma=0.5, lam=0.25)
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def no_bootstrap(trainer: Trainer) -> None:
    """No value is bootstrapped past the end."""
    case = random_case(WORLD, (1, 2, 3), ((1, 0), (2, 2, 3), (0,)), SCORES[:3], lam=0.5)
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def returns(trainer: Trainer) -> None:
    """The return is the advantage plus the value."""
    case = full_case(lam=0.5)
    parallel(value_change(case, trainer), value_change(case, oracle_trainer))


def value_loss(trainer: Trainer) -> None:
    """The value loss is ½ (V − R)² with R a constant, times its coefficient."""
    case = full_case()
    close(value_change(case, trainer), value_change(case, oracle_trainer))


def value_mean(trainer: Trainer) -> None:
    """The value loss is the mean over response tokens."""
    case = without_values(short_case())
    visited = [state for row in rows(case) for state in case.states(row)]
    close(value_change(case, trainer)[visited].norm(), value_change(case, oracle_trainer)[visited].norm())


def values_are_their_own(trainer: Trainer) -> None:
    """The policy's loss does not move the values."""
    close(value_change(full_case(value_coef=0.0), trainer), 0.0)


def _whitened(trainer: Trainer) -> Tensor:
    case = without_values(full_case(whiten_advantages=True, gamma=0.5, lam=0.5, kl_coef=0.5))
    sizes = read_flat(case, trainer)
    return torch.tensor(sizes, dtype=torch.float64) * len(sizes)


def whitened_mean(trainer: Trainer) -> None:
    """Whitened advantages have mean 0."""
    whitened = _whitened(trainer)
    close(whitened.mean() / whitened.std(), 0.0)


def whitened_variance(trainer: Trainer) -> None:
    """Whitened advantages have population variance 1."""
    found = float(_whitened(trainer).var(correction=0))
    assert abs(found - 1.0) < 1e-6, f"the variance is {found:.9g}"  # 1e-8 is added to it before the root is taken


def whitening_mask(trainer: Trainer) -> None:
    """Whitening reads response tokens only."""
    case = without_values(short_case(whiten_advantages=True, gamma=0.5, lam=0.5, kl_coef=0.5))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def whitening_batch(trainer: Trainer) -> None:
    """Whitening reads the whole batch, and no minibatch or row alone."""
    case = without_values(full_case(whiten_advantages=True, gamma=0.5, lam=0.5, kl_coef=0.5, minibatch_size=1))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def whitened_rewards(trainer: Trainer) -> None:
    """Whitened rewards keep their mean."""
    case = without_values(full_case(whiten_rewards=True, kl_coef=0.5))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))
