"""TRL's numeric functions, called as they are: ``trl_1_16`` for that release, ``trl_1_12`` for the last with PPO.

What TRL computes inside a trainer's method is no function that can be called, and is reported as missing rather than
copied: a copy would test the copy.
"""

from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor


def _function(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


_INLINE_GRPO = "inline in GRPOTrainer"
_INLINE_PPO = "inline in PPOTrainer.train"


class TRL116:
    """``trl.trainer.utils`` of TRL 1.16."""

    name = "TRL 1.16"
    missing: ClassVar = {
        "gae": "has no value model",
        "whiten": "has none",
        "masked_mean": "inline in GRPOTrainer",
        "kl": _INLINE_GRPO,
        "policy_loss": _INLINE_GRPO,
        "value_loss": "has no value model",
    }

    @staticmethod
    def token_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return ``selective_log_softmax``."""
        return _function("trl.trainer.utils", "selective_log_softmax")(logits, labels, temperature=temperature)

    @staticmethod
    def entropy(logits: Tensor) -> Tensor:
        """Return ``entropy_from_logits``."""
        return _function("trl.trainer.utils", "entropy_from_logits")(logits)

    @staticmethod
    def last_token_index(mask: Tensor) -> Tensor:
        """Return ``first_true_indices`` of the padding, less 1: the use that TRL makes of it."""
        return _function("trl.experimental.utils", "first_true_indices")(~mask) - 1


class TRL112:
    """``trl.experimental.ppo`` of TRL 1.12, the last release with a PPO trainer, and what it uses."""

    name = "TRL 1.12 PPO"
    missing: ClassVar = {"gae": _INLINE_PPO, "kl": _INLINE_PPO, "policy_loss": _INLINE_PPO, "value_loss": _INLINE_PPO}
    last_token_index = TRL116.last_token_index
    entropy = TRL116.entropy

    @staticmethod
    def token_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return ``selective_log_softmax`` of logits divided as PPOTrainer divides them, by the temperature + 1e-7."""
        return _function("trl.trainer.utils", "selective_log_softmax")(logits / (temperature + 1e-7), labels)

    @staticmethod
    def whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
        """Return ``masked_whiten``, 0 outside the mask: the trainer fills it so afterwards."""
        whitened = _function("trl.experimental.ppo.ppo_trainer", "masked_whiten")(x, mask, shift_mean)
        return whitened.masked_fill(~mask, 0.0)

    @staticmethod
    def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
        """Return ``masked_mean``."""
        return _function("trl.experimental.ppo.ppo_trainer", "masked_mean")(x, mask)


trl_1_16 = TRL116
trl_1_12 = TRL112
