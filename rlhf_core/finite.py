"""What is not finite, by name: training stops at it and nothing more is saved."""

import math

import torch

from rlhf_core.policy import ActorCritic
from rlhf_core.update_statistics import LOSS_SUMS
from rlhf_kernels import sum_of_squares


class NonFiniteError(FloatingPointError):
    """A tensor of the step holds NaN or infinity."""

    def __init__(self, step: int, name: str) -> None:
        self.step = step
        self.name = name
        super().__init__(
            f"step {step}: {name} is not finite, so training stops and nothing more is saved; "
            "lower the learning rate, or look at the reward"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; of float32 in one read: no square of one is too large for float64."""
    if tensor.dtype == torch.float32:
        return math.isfinite(sum_of_squares(tensor))
    return bool(tensor.isfinite().all())


def first_nonfinite_of_update(model: ActorCritic, sums: torch.Tensor) -> str:
    """Return the name of the first non-finite tensor: a loss, else a parameter's gradient."""
    for name, value in zip(LOSS_SUMS, sums.tolist(), strict=True):
        if not math.isfinite(value):
            return name
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            return f"the gradient of {name}"
    return "the total gradient norm"


def require_finite(step: int, mask_BT: torch.Tensor | None, **tensors: torch.Tensor | None) -> None:
    """Raise NonFiniteError with the name of the first tensor that is not finite where the mask is True."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not is_finite(tensor if mask_BT is None else torch.where(mask_BT, tensor, 0.0)):
            raise NonFiniteError(step, name)
