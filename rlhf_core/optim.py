"""AdamW and gradient norms in arithmetic that is the same on every processor."""

import math
from collections.abc import Iterable

import torch

from rlhf_kernels import sums_of_squares


def adamw(
    parameters: Iterable[torch.nn.Parameter], *, lr: float, beta2: float, eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW with the fused kernel.

    The plain and the foreach ones call ``torch.sqrt``, which is not correctly rounded and differs by processor.
    """
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, beta2), eps=eps, weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return the gradients that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def add_gradients(parameters: Iterable[torch.nn.Parameter], grads: Iterable[torch.Tensor | None]) -> None:
    """Add to each parameter's gradient, in place where it has one."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def total_norm(grads: list[torch.Tensor]) -> float:
    """Return √Σ g² over all gradients; with Python's square root, for the reason given at :func:`adamw`."""
    return math.sqrt(math.fsum(sums_of_squares(grads)))


def clip_gradients(grads: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of total norm ``norm`` down to ``max_norm``, in place; shorter ones stay untouched."""
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
