"""This project's own numeric functions: the default of ``--implementation``."""

from torch import Tensor

from rlhf_core import advantages, losses
from rlhf_kernels import gae as kernel_gae
from rlhf_kernels import token_logprobs as kernel_token_logprobs
from rlhf_kernels import whiten as kernel_whiten


class Kit:
    """``rlhf_kernels`` and the pure functions of ``rlhf_core``."""

    name = "RLHF Systems Kit"

    @staticmethod
    def token_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Return log-probs of the labels."""
        return kernel_token_logprobs(logits, labels, temperature=temperature)

    @staticmethod
    def entropy(logits: Tensor) -> Tensor:
        """Return entropies, from the same pass as the log-probs."""
        labels = logits.argmax(dim=-1)
        return kernel_token_logprobs(logits, labels, with_entropy=True)[1]

    @staticmethod
    def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        """Return advantages and returns."""
        return kernel_gae(rewards, values, mask, gamma=gamma, lam=lam)

    @staticmethod
    def whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
        """Return whitened numbers, by the population variance."""
        return kernel_whiten(x, mask, shift_mean=shift_mean)

    @staticmethod
    def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over the mask."""
        return losses.masked_sum(x, mask) / mask.sum()

    @staticmethod
    def last_token_index(mask: Tensor) -> Tensor:
        """Return the last response token of each row."""
        return advantages.last_token_index(mask)

    @staticmethod
    def kl(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
        """Return the KL of each token."""
        return advantages.kl_penalties(logp, ref_logp, estimator)

    @staticmethod
    def policy_loss(logp: Tensor, old_logp: Tensor, advantages_BT: Tensor, mask: Tensor, clip_range: float) -> Tensor:
        """Return the clipped surrogate's mean."""
        log_ratio = losses.log_ratio(logp, old_logp, mask)
        token_losses = losses.clipped_policy_losses(log_ratio, advantages_BT, mask, clip_range=clip_range)
        return losses.loss_sum(token_losses, mask, "token") / losses.loss_count(mask, "token", mask.shape[1])

    @staticmethod
    def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
        """Return half the clipped squared error's mean."""
        token_losses = losses.clipped_value_losses(values, old_values, returns, mask, clip_range=clip_range)
        return losses.loss_sum(token_losses, mask, "token") / losses.loss_count(mask, "token", mask.shape[1])


adapter = Kit
