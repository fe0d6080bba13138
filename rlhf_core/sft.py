"""Supervised training: language modelling, and the optimizer and schedule that classifiers share."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_core.config import PretrainConfig
from rlhf_core.data.batches import batches, right_pad
from rlhf_core.data.dataset import Rows
from rlhf_core.metrics import SFT_METRICS, rounded
from rlhf_core.optim import adamw, clip_gradients, gradients, set_learning_rate, total_norm
from rlhf_core.policy import ForwardArguments, autocast, response_logits
from rlhf_core.scoring import response_scores
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
    logits_of = partial(response_logits, model, ForwardArguments(model))
    usable = [sequence for sequence in sequences if len(sequence) > 1]
    if not usable:
        raise ValueError(f"none of the {len(sequences)} sequences has two tokens, so there is nothing to predict")

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        ids_BL, mask_BL = (x.to(device) for x in right_pad([usable[row] for row in rows], pad_id))
        logprobs_BT, _ = response_scores(model, logits_of, ids_BL, mask_BL, ids_BL.shape[1] - 1, temperature=1.0)
        counted_BT = mask_BL[:, 1:].bool()
        return -torch.where(counted_BT, logprobs_BT, 0.0).sum() / counted_BT.sum()

    order = batches([len(sequence) for sequence in usable], config.batch_size, seed, "pretrain")
    train_supervised(model, loss_of_rows, order, steps=steps, learning_rate=config.learning_rate, report=report)


class CompletionObjective:
    """Mean negative log-likelihood of completions given their prompts, in nats a token; prompts are not learned.

    A text is a completion of nothing: its first token is learned only behind a beginning-of-sequence token, because
    without one there is nothing that it could be predicted from.
    """

    metrics = SFT_METRICS

    def __init__(self, model: PreTrainedModel, rows: Rows, pad_id: int, dtype: str) -> None:
        self.model = model.requires_grad_(True)
        self._prompts, self._completions = rows.column("prompt"), rows.column("completion")
        self._pad_id, self._dtype = pad_id, dtype
        self._arguments = ForwardArguments(model)
        prompt_lengths, lengths = self._prompts.lengths(), self._completions.lengths()
        self._lengths = prompt_lengths + lengths
        self._units = lengths - (prompt_lengths == 0)
        if not self._units.any():
            raise ValueError("no row has two tokens, so there is nothing to predict")

    def lengths(self) -> Sequence[int]:
        """Return the tokens of each row, prompt and completion."""
        return self._lengths.tolist()

    def units(self, rows: Sequence[int] | np.ndarray) -> int:
        """Return the tokens that are learned; at least 1, so that a batch of one-token texts divides by something."""
        return max(1, int(self._units[list(rows)].sum()))

    def losses(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the summed loss, and how many tokens are the model's likeliest."""
        device = next(self.model.parameters()).device
        prompts, completions = [self._prompts[row] for row in rows], [self._completions[row] for row in rows]
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        ids_BL, mask_BL = (x.to(device) for x in right_pad(whole, self._pad_id))
        positions = self._arguments.positions(mask_BL)
        with autocast(device, self._dtype):
            logits_BLV = self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, **positions).logits
        starts_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        places_L = torch.arange(1, ids_BL.shape[1], device=device)
        learned_BT = mask_BL[:, 1:].bool() & (places_L >= starts_B1)
        labels_BT = ids_BL[:, 1:]
        logprobs_BT = token_logprobs(logits_BLV[:, :-1], labels_BT)
        right_BT = (logits_BLV[:, :-1].detach().argmax(dim=-1) == labels_BT) & learned_BT
        return -torch.where(learned_BT, logprobs_BT, 0.0).sum(), {"token_accuracy": float(right_BT.sum())}

    @torch.no_grad()
    def evaluate(self, batch_size: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """Return the mean loss and its exponential over all rows."""
        total, right = 0.0, 0.0
        for start in range(0, len(self._lengths), batch_size):
            rows = range(start, min(start + batch_size, len(self._lengths)))
            loss, figures = self.losses(rows)
            total, right = total + loss.double().item(), right + figures["token_accuracy"]
            advance(len(rows))
        units = self.units(np.arange(len(self._lengths)))
        return {
            "rows": len(self._lengths),
            "tokens": units,
            "loss": rounded(total / units),
            "perplexity": rounded(math.exp(min(total / units, 700.0))),
            "token_accuracy": rounded(right / units),
        }
