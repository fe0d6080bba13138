"""Reward models: a transformer with one number at the last token, learned from preferences.

They are transformers' own ``AutoModelForSequenceClassification`` with one label: a saved one loads there, and one that
somebody else trained loads here. The sentiment classifiers of labelled sentences are trained here too.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import ClassifierConfig
from rlhf_core.data.batches import batches, right_pad
from rlhf_core.data.dataset import Rows
from rlhf_core.metrics import REWARD_METRICS
from rlhf_core.packing import hidden_states, pack, packable
from rlhf_core.policy import ForwardArguments, as_computed_here, autocast, load_pretrained, quiet_transformers
from rlhf_core.preferences import bradley_terry_loss, centering_loss
from rlhf_core.reward import Classifier
from rlhf_core.reward_report import JudgedPairs
from rlhf_core.sft import Report, train_supervised
from rlhf_core.stage_config import PreferenceConfig


class RewardModel(nn.Module):
    """A sequence-classification model of transformers, read at each row's last token."""

    def __init__(self, model: Any) -> None:
        """Wrap a model that has a trunk and a linear layer ``score`` with one output."""
        super().__init__()
        self.model = model
        self._arguments = ForwardArguments(model.base_model)
        self.eval()

    def forward(self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
        """Return [B] float32 rewards of right-padded rows."""
        return self.model.score(self._last_hidden_states(input_ids_BL, attention_mask_BL)).squeeze(-1).float()

    def _last_hidden_states(self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
        blocks = packable(self.model.base_model)
        if blocks is not None:
            packed = pack(input_ids_BL, attention_mask_BL, response_length=0)
            return hidden_states(blocks, packed, packed.starts[1:] - 1)
        hidden_BLD: torch.Tensor = self.model.base_model(
            input_ids=input_ids_BL,
            attention_mask=attention_mask_BL,
            use_cache=False,
            **self._arguments.positions(attention_mask_BL),
        ).last_hidden_state
        last_B = attention_mask_BL.sum(dim=1) - 1
        return hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B]


def new_reward_model(lm: PreTrainedModel) -> RewardModel:
    """Return a reward model whose trunk is a copy of a language model's and whose head is 0.

    Raises:
        ValueError: transformers has no sequence classification of this architecture with a linear head ``score``.
    """
    try:
        shape = copy.deepcopy(lm.config)
        shape.num_labels = 1
        attention = lm.config._attn_implementation
        with quiet_transformers():
            model: Any = AutoModelForSequenceClassification.from_config(
                shape, attn_implementation=attention, dtype=torch.float32
            )
        model.base_model.load_state_dict(lm.base_model.state_dict())
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"a {lm.config.model_type} model cannot become a reward model: {error}") from None
    _require_score(model, lm.config.model_type)
    nn.init.zeros_(model.score.weight)
    as_computed_here(model)
    return RewardModel(model.requires_grad_(True).to(lm.device))


def _require_score(model: PreTrainedModel, name: str) -> None:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(f"{name}: a reward model needs a linear layer 'score' with one output (num_labels 1)")


def load_reward_model(path: str | Path, attention: str) -> RewardModel:
    """Load a reward model from its folder, a run of ``rlhf reward``, or the hub.

    Raises:
        FileNotFoundError, ValueError: it is missing, damaged, or no reward model: a language model has no ``score``.
    """
    try:
        model = load_pretrained(AutoModelForSequenceClassification, path, attention, num_labels=1)
    except ValueError as error:
        if "score.weight" not in str(error):
            raise
        raise ValueError(f"{str(path)!r} is no reward model ({error}); rlhf reward trains one") from None
    _require_score(model, str(path))
    return RewardModel(model.requires_grad_(False))


def save_reward_model(reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a reward model as a transformers folder.

    Transformers reads the reward at the last token that is no padding. Where padding is the end-of-sequence token that
    would be the token before, so such a model is saved without a padding token: it then takes one row at a time.
    """
    distinct = tokenizer.pad_token_id != tokenizer.eos_token_id
    reward_model.model.config.pad_token_id = tokenizer.pad_token_id if distinct else None
    reward_model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class PairObjective:
    """The Bradley–Terry loss of pairs with margins, ties and centring, mean over pairs."""

    metrics = REWARD_METRICS

    def __init__(self, model: RewardModel, rows: Rows, pad_id: int, dtype: str, config: PreferenceConfig) -> None:
        self.model = model
        self._columns = {name: rows.column(name) for name in ("prompt", "chosen", "rejected")}
        margins_and_ties = rows.margins_and_ties()
        self._margins = torch.from_numpy(np.ascontiguousarray(margins_and_ties[:, 0], dtype=np.float32))
        self._ties = torch.from_numpy(np.ascontiguousarray(margins_and_ties[:, 1], dtype=np.float32))
        self._pad_id, self._dtype, self._config = pad_id, dtype, config

    def lengths(self) -> Sequence[int]:
        """Return the tokens of each pair, its prompt counted twice."""
        lengths = [column.lengths() for column in self._columns.values()]
        return (2 * lengths[0] + lengths[1] + lengths[2]).tolist()

    def units(self, rows: Sequence[int]) -> int:
        """Return the number of pairs."""
        return len(rows)

    def _rewards(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B] rewards of the chosen and of the rejected completions: one batch of 2 B rows."""
        device = next(self.model.parameters()).device
        sides = [
            [self._columns["prompt"][row] + self._columns[name][row] for row in rows] for name in ("chosen", "rejected")
        ]
        ids_BL, mask_BL = (x.to(device) for x in right_pad(sides[0] + sides[1], self._pad_id))
        with autocast(device, self._dtype):
            rewards_B = self.model(ids_BL, mask_BL)
        return rewards_B[: len(rows)], rewards_B[len(rows) :]

    def losses(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the summed loss, and sums of accuracy, gap and reward."""
        chosen_B, rejected_B = self._rewards(rows)
        margin_B = self._config.margin_scale * self._margins[list(rows)].to(chosen_B.device)
        tie_B = self._ties[list(rows)].to(chosen_B.device)
        loss = bradley_terry_loss(chosen_B, rejected_B, margin_B, tie_B)
        if self._config.centering:
            loss = loss + self._config.centering * centering_loss(chosen_B, rejected_B)
        with torch.no_grad():
            gap_B = chosen_B - rejected_B
            right_B = (torch.sign(gap_B) + 1) / 2
            figures = {"accuracy": right_B, "gap_mean": gap_B, "reward_mean": (chosen_B + rejected_B) / 2}
        return loss, {name: value_B.double().sum().item() for name, value_B in figures.items()}

    @torch.no_grad()
    def judge(self, batch_size: int, advance: Callable[[int], None]) -> JudgedPairs:
        """Return the rewards of all pairs."""
        n = len(self._ties)
        rewards: list[torch.Tensor] = []
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            rewards.append(torch.stack(self._rewards(rows)).double().cpu())
            advance(len(rows))
        chosen, rejected = torch.cat(rewards, dim=1).numpy()
        lengths = [self._columns[name].lengths() for name in ("chosen", "rejected")]
        return JudgedPairs(chosen, rejected, self._ties.numpy(), *lengths)


def train_classifier(
    lm: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    labels: Sequence[bool],
    config: ClassifierConfig,
    *,
    pad_id: int,
    seed: int,
    purpose: str,
    report: Report,
) -> Classifier:
    """Train a classifier whose trunk starts as a copy of a language model's.

    Args:
        lm: the language model; it stays as it is.
        sequences: token ids.
        labels: True for positive.
        config: steps, batch size and rate.
        pad_id: what fills short rows.
        seed: decides, with ``purpose``, the order of the data.
        purpose: ``"reward"`` or ``"evaluator"``.
        report: hears of each step's loss.
    """
    classifier = Classifier(lm)
    device = next(lm.parameters()).device
    classifier.to(device)
    targets = torch.tensor(labels, dtype=torch.float32)

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        ids_BL, mask_BL = (x.to(device) for x in right_pad([sequences[row] for row in rows], pad_id))
        return torch.nn.functional.binary_cross_entropy_with_logits(
            classifier(ids_BL, mask_BL), targets[rows].to(device)
        )

    order = batches([len(sequence) for sequence in sequences], config.batch_size, seed, purpose)
    train_supervised(
        classifier, loss_of_rows, order, steps=config.steps, learning_rate=config.learning_rate, report=report
    )
    return classifier.requires_grad_(False)


@torch.no_grad()
def accuracy(
    classifier: Classifier, sequences: Sequence[Sequence[int]], labels: Sequence[bool], *, pad_id: int
) -> float:
    """Return the share of sequences whose logit has the sign of their label."""
    right = 0
    device = next(classifier.parameters()).device
    for start in range(0, len(sequences), 64):
        ids, mask = right_pad(sequences[start : start + 64], pad_id)
        logits = classifier(ids.to(device), mask.to(device))
        right += int(((logits > 0).cpu() == torch.tensor(labels[start : start + 64])).sum())
    return right / len(sequences)
