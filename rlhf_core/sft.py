"""Supervised training: language modelling, and the optimizer and schedule that classifiers share."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from rlhf_core.batches import batches, right_pad
from rlhf_core.config import PretrainConfig
from rlhf_core.optim import adamw, clip_gradients, gradients, set_learning_rate, total_norm
from rlhf_core.policy import ForwardArguments
from rlhf_kernels import token_logprobs

Report = Callable[[float], None]
"""Hears of the loss after each optimizer step, and may raise to stop."""


def warmup_then_linear(step: int, steps: int) -> float:
    """Return the factor of the peak rate at ``step`` (from 0): up over a twentieth of the steps, down to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)


def train_supervised(
    model: torch.nn.Module,
    loss_of_rows: Callable[[list[int]], torch.Tensor],
    rows: Iterator[list[int]],
    *,
    steps: int,
    learning_rate: float,
    report: Report,
) -> None:
    """Minimise a loss over batches of rows with AdamW, gradient norms clipped to 1.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the message names the step.
    """
    optimizer = adamw(model.parameters(), lr=learning_rate, beta2=0.99, eps=1e-8, weight_decay=0.01)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate * warmup_then_linear(step, steps))
        loss = loss_of_rows(next(rows))
        loss.backward()
        grads = gradients(model.parameters())
        value, norm = loss.item(), total_norm(grads)
        for name, number in (("loss", value), ("gradient norm", norm)):
            if not math.isfinite(number):
                raise FloatingPointError(
                    f"the {name} is {number} at supervised step {step + 1}; lower the learning rate"
                )
        clip_gradients(grads, norm, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(value)


def train_language_model(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    config: PretrainConfig,
    *,
    steps: int,
    pad_id: int,
    seed: int,
    report: Report,
) -> None:
    """Train a causal language model on token sequences: mean negative log-likelihood of every token but the first.

    Args:
        model: the model, changed in place; dropout stays off.
        sequences: token ids, the end-of-sequence token included.
        config: batch size and rate.
        steps: optimizer steps.
        pad_id: what fills short rows.
        seed: decides the order of the data.
        report: hears of each step's loss in nats a token.

    Raises:
        ValueError: no sequence has a second token, so there is nothing to predict.
        FloatingPointError: the loss or its gradient is not finite.
    """
    device = next(model.parameters()).device
    arguments = ForwardArguments(model)
    usable = [sequence for sequence in sequences if len(sequence) > 1]
    if not usable:
        raise ValueError(f"none of the {len(sequences)} sequences has two tokens, so there is nothing to predict")

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        ids_BL, mask_BL = (x.to(device) for x in right_pad([usable[row] for row in rows], pad_id))
        output = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, **arguments.positions(mask_BL))
        logprobs = token_logprobs(output.logits[:, :-1], ids_BL[:, 1:])
        counted = mask_BL[:, 1:].bool()
        return -torch.where(counted, logprobs, 0.0).sum() / counted.sum()

    order = batches([len(sequence) for sequence in usable], config.batch_size, seed, "pretrain")
    train_supervised(model, loss_of_rows, order, steps=steps, learning_rate=config.learning_rate, report=report)
