"""The other algorithms: advantages of groups, the means of the loss, the KL penalty's estimators and places.

Properties of a trainer, in the order of :mod:`rlhf_core.testing.properties`; the docstring of each is its claim.
"""

from typing import Any

from rlhf_core.testing.case import Case, Trainer, random_case
from rlhf_core.testing.oracle import oracle_trainer
from rlhf_core.testing.readings import (
    SCORES,
    WORLD,
    ask_each,
    close,
    full_case,
    policy_change,
    without_values,
)


def _group_case(group_size: int = 4, **settings: object) -> Case:
    """Two prompts of four responses each, of unequal length."""
    responses = ((1, 0), (2, 2, 3), (0,), (3, 1, 0), (1, 3, 2), (2, 0), (3, 3, 1), (0,))
    scores = (1.0, -0.75, 2.5, 0.5, 0.25, 3.0, -1.0, 0.125)
    return random_case(
        WORLD, (0, 0, 0, 0, 1, 1, 1, 1), responses, scores, group_size=group_size, kl_coef=0.5, **settings
    )


def _as_the_oracle(trainer: Trainer, case: Case) -> None:
    close(policy_change(case, trainer), policy_change(case, oracle_trainer))


def _follows_the_oracle(trainer: Trainer, algorithm: str, group_size: int = 4, **settings: object) -> None:
    settings = {"algorithm": algorithm, "epochs": 3, "learning_rate": 0.25, "whiten_advantages": None, **settings}
    _as_the_oracle(trainer, _group_case(group_size, **settings))


def group_mean(trainer: Trainer) -> None:
    """The baseline of a response is the mean score of its prompt's responses."""
    case = _group_case(advantage="group-mean").change(settings={"kl_coef": 0.0})
    _as_the_oracle(trainer, case)


def leave_one_out(trainer: Trainer) -> None:
    """The baseline of a response is the mean score of its prompt's other responses."""
    case = _group_case(advantage="leave-one-out").change(settings={"kl_coef": 0.0})
    _as_the_oracle(trainer, case)


def group_standard_score(trainer: Trainer) -> None:
    """The standard score of a response divides by the sample deviation of its prompt's scores."""
    case = _group_case(advantage="group-standard-score").change(settings={"kl_coef": 0.0})
    _as_the_oracle(trainer, case)


def kl_in_the_reward(trainer: Trainer) -> None:
    """A KL penalty in the reward is what its estimator says of the token, and a constant."""

    def ask(estimator: str) -> None:
        case = full_case(kl_place="reward", kl_estimator=estimator, kl_coef=0.5, gamma=0.0, lam=0.0)
        _as_the_oracle(trainer, without_values(case).change(scores=(0.0, 0.0, 0.0)))

    ask_each(ask, ("k1", "k2", "k3"))


def kl_in_the_loss(trainer: Trainer) -> None:
    """A KL penalty in the loss is in no reward, and pulls by the gradient of its estimator."""

    def ask(estimator: str) -> None:
        case = _group_case(kl_place="loss", kl_estimator=estimator, group_size=1)
        _as_the_oracle(trainer, without_values(case).change(scores=(0.0,) * 8))

    ask_each(ask, ("k2", "k3", "k3-weighted"))


def adaptive_kl_in_the_loss(trainer: Trainer) -> None:
    """A KL penalty in the loss has the coefficient that follows its target: the next step takes it."""
    for target in (0.01, 100.0):  # far below the KL and far above it
        case = _group_case(
            kl_place="loss",
            kl_estimator="k2",
            group_size=1,
            kl_control="adaptive",
            kl_target=target,
            kl_horizon=30,
            steps=2,
        )
        _as_the_oracle(trainer, without_values(case).change(scores=(0.0,) * 8))


def loss_means(trainer: Trainer) -> None:
    """The loss is a mean over tokens, sequences, sequences of sums or the longest possible, as configured."""

    def ask(loss_mean: str) -> None:
        # The longest response has two tokens, and could have three.
        case = random_case(WORLD, (0, 1, 2), ((1, 0), (0,), (3, 0)), SCORES[:3], loss_mean=loss_mean)
        _as_the_oracle(trainer, case)

    ask_each(ask, ("token", "sequence", "sum", "constant"))


def grpo(trainer: Trainer) -> None:
    """GRPO's whole step is the oracle's."""
    _follows_the_oracle(trainer, "grpo")


def dr_grpo(trainer: Trainer) -> None:
    """Dr. GRPO's whole step is the oracle's."""
    _follows_the_oracle(trainer, "dr-grpo")


def rloo(trainer: Trainer) -> None:
    """RLOO's whole step is the oracle's."""
    _follows_the_oracle(trainer, "rloo")


def reinforce_plus_plus(trainer: Trainer) -> None:
    """REINFORCE++'s whole step, discounted without its baseline and with it, is the oracle's."""
    discounted: dict[str, Any] = {"algorithm": "reinforce++", "group_size": 1, "gamma": 0.5}
    with_baseline: dict[str, Any] = {"algorithm": "reinforce++-baseline"}
    ask_each(lambda settings: _follows_the_oracle(trainer, **settings), (discounted, with_baseline))
