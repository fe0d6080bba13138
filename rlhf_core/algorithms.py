"""The policy-gradient algorithms as data: what distinguishes them, over one and the same loop.

Each is a choice of advantage estimator, of how token losses are averaged, and of where and how the KL penalty enters.
The estimators are in :mod:`rlhf_core.advantages`, the losses in :mod:`rlhf_core.losses`. No torch here: the
configuration is made of these.
"""

from dataclasses import dataclass
from typing import Literal

AlgorithmName = Literal["ppo", "grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline"]
Advantage = Literal["gae", "reward-to-go", "group-mean", "group-standard-score", "leave-one-out"]
LossMean = Literal["token", "sequence", "sum", "constant"]
KLPlace = Literal["reward", "loss"]
KLEstimator = Literal["k1", "k2", "k3", "k3-weighted"]


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm is made of."""

    advantage: Advantage
    """gae needs a value model; the group estimators compare a prompt's completions; reward-to-go needs neither."""
    group_size: int
    """Completions a prompt."""
    whiten_advantages: bool
    """Whether the batch's advantages are shifted and scaled to mean 0 and variance 1 over the mask."""
    loss_mean: LossMean
    """How the losses of a minibatch's tokens become one number."""
    kl_place: KLPlace
    """Whether the penalty is part of the reward or of the loss."""
    kl_estimator: KLEstimator
    """What estimates the KL of a token."""

    @property
    def has_value_model(self) -> bool:
        """Whether values are estimated and trained."""
        return self.advantage == "gae"

    @property
    def has_closed_form(self) -> bool:
        """Whether targets and first gradient are those of PPO with the KL in the reward, which every step checks."""
        in_reward = (self.kl_place, self.kl_estimator) == ("reward", "k1")
        return self.has_value_model and in_reward and self.loss_mean == "token"

    @property
    def compares_groups(self) -> bool:
        """Whether the advantage is relative to a prompt's other completions."""
        return self.advantage in ("group-mean", "group-standard-score", "leave-one-out")


ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    # Schulman et al. (2017), for language models as in Ziegler et al. (2019) and Huang et al. (2023).
    "ppo": Algorithm("gae", 1, True, "token", "reward", "k1"),
    # Shao et al., "DeepSeekMath" (2024), eq. 3 and 4.
    "grpo": Algorithm("group-standard-score", 8, False, "sequence", "loss", "k3"),
    # Liu et al., "Understanding R1-Zero-Like Training" (2025): GRPO without its two biases. They train without a KL
    # penalty (--ppo.kl-coef 0 does); where there is one, it is the estimator whose gradient is unbiased as well.
    "dr-grpo": Algorithm("group-mean", 8, False, "constant", "loss", "k3-weighted"),
    # Ahmadian et al., "Back to Basics" (2024), eq. 7 and 8: the whole response is one action.
    "rloo": Algorithm("leave-one-out", 4, False, "sum", "reward", "k1"),
    # Hu et al., "REINFORCE++" (2025), sections 3.1 and 3.2.
    "reinforce++": Algorithm("reward-to-go", 1, True, "token", "reward", "k1"),
    "reinforce++-baseline": Algorithm("group-mean", 4, True, "token", "loss", "k2"),
}
