"""What a correct PPO trainer does, as a list of named properties, each of which a mistake can break on its own.

A property puts a question to a trainer (:class:`~rlhf_core.testing.case.Case`) whose answer is known in closed form, or
from the loops of :mod:`rlhf_core.testing.oracle`, and looks at one side of the answer only: at which prefixes moved, at
the direction, or at the length of the change. So the names of the broken properties say what is wrong; they stand in
order, what others rest on first, so the first that is broken is the likeliest cause::

    from rlhf_core.testing.properties import examine

    def test_my_trainer():
        verdict = examine(my_trainer)
        assert verdict.broken == {}  # name of the property -> what was found
        assert set(verdict.left_out) == {"grpo", "dr_grpo"}  # what my trainer does not have

Numbers in brackets are a cell: its prefix (:func:`~rlhf_core.testing.tabular.tabular_states` has them in order) and its
token. Tolerance: 1e-9, of float64 arithmetic of values around 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_core.testing.case import Trainer
from rlhf_core.testing.claims import algorithms, rewards, runs, tokens

Check = Callable[[Trainer], None]

ORDER: tuple[Check, ...] = (
    # which token, which prefix
    tokens.labels_are_shifted_by_one,
    tokens.temperature,
    tokens.advantages_are_constants,
    tokens.reward_raises,
    tokens.left_padding,
    tokens.eos_is_trained,
    tokens.score_on_last_token,
    tokens.own_score,
    tokens.reaches_back,
    tokens.nothing_behind_the_end,
    tokens.no_value_behind_the_end,
    # the ratio, the mean, the batch and its parts
    tokens.first_ratio,
    tokens.equal_weights,
    tokens.policy_mean,
    tokens.micro_batches,
    tokens.zeroed,
    tokens.minibatch_mean,
    tokens.clipped_norm,
    # rewards, advantages, returns
    rewards.kl_direction,
    rewards.kl_size,
    rewards.kl_temperature,
    rewards.missing_eos,
    rewards.gamma_and_lambda,
    rewards.no_bootstrap,
    rewards.returns,
    rewards.value_loss,
    rewards.value_mean,
    rewards.values_are_their_own,
    # whitening
    rewards.whitened_mean,
    rewards.whitened_variance,
    rewards.whitening_mask,
    rewards.whitening_batch,
    rewards.whitened_rewards,
    # epochs and the run
    runs.clipping,
    runs.value_clipping,
    runs.epochs,
    runs.dropout,
    runs.schedule,
    runs.reference,
    runs.adaptive_kl,
    # everything at once, and the log
    runs.expected_gradient,
    runs.rollout_log,
    runs.update_log,
    runs.whole,
    # the other algorithms
    algorithms.group_mean,
    algorithms.leave_one_out,
    algorithms.group_standard_score,
    algorithms.kl_in_the_reward,
    algorithms.kl_in_the_loss,
    algorithms.adaptive_kl_in_the_loss,
    algorithms.loss_means,
    algorithms.grpo,
    algorithms.dr_grpo,
    algorithms.rloo,
    algorithms.reinforce_plus_plus,
)


@dataclass(frozen=True)
class Property:
    """A named claim about a trainer."""

    name: str
    claim: str
    check: Check
    """Raises AssertionError, with what was found, when the claim does not hold."""


PROPERTIES = {check.__name__: Property(check.__name__, (check.__doc__ or "").strip(), check) for check in ORDER}


@dataclass(frozen=True)
class Verdict:
    """What asking a trainer for every property came to, in the order of :data:`PROPERTIES`."""

    broken: dict[str, str]
    """Name to what was found."""
    left_out: dict[str, str]
    """Name to why all or part of it could not be asked: what the trainer said with its NotImplementedError, or did not
    log."""


def examine(trainer: Trainer) -> Verdict:
    """Ask a trainer for every property.

    Raises:
        ValueError: the trainer refuses every property, so that nothing is known of it.
    """
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for item in PROPERTIES.values():
        try:
            item.check(trainer)
        except NotImplementedError as error:
            left_out[item.name] = str(error) or "NotImplementedError"
        except Exception as error:  # a trainer that fails in any way breaks the property
            found[item.name] = f"{type(error).__name__}: {error}"
    if len(left_out) == len(PROPERTIES):
        raise ValueError("the trainer raises NotImplementedError for every property: nothing was asked")
    return Verdict(found, left_out)


def broken(trainer: Trainer) -> dict[str, str]:
    """Return the properties that a trainer breaks, as :func:`examine` finds them; what was left out is not among them.

    Raises:
        ValueError: the trainer refuses every property.
    """
    return examine(trainer).broken
