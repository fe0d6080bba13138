"""AdamW and gradient norms in arithmetic that is the same on every processor."""

import math
from collections.abc import Iterable

import torch


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


def total_norm(grads: list[torch.Tensor]) -> float:
    """Return √Σ g² over all gradients; products and Python's square root, for the reason given at :func:`adamw`."""
    if not grads:
        return 0.0
    squares = torch.stack([torch.dot(grad.flatten(), grad.flatten()) for grad in grads])
    return math.sqrt(squares.double().sum().item())


def clip_gradients(grads: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of total norm ``norm`` down to ``max_norm``, in place; shorter ones stay untouched."""
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
