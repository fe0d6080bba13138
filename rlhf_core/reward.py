"""What scores a completion."""

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.batches import right_pad
from rlhf_core.policy import ForwardArguments
from rlhf_core.rollout import Rollout


class Reward(Protocol):
    """Scores rollouts."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Return [B] float32 scores on the CPU."""
        ...


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of token rows, without special tokens."""
    return [str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows]


class TextReward:
    """A reward computed by a Python function of the whole text, prompt and completion."""

    def __init__(self, score: Callable[[str], float], tokenizer: PreTrainedTokenizerBase) -> None:
        self._score = score
        self._tokenizer = tokenizer

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Return [B] float32 scores of the decoded texts."""
        texts = decode(self._tokenizer, rollout.token_ids())
        return torch.tensor([self._score(text) for text in texts], dtype=torch.float32)


class Classifier(nn.Module):
    """A transformer trunk with one logit, read at each sequence's last token: positive above 0."""

    def __init__(self, lm: PreTrainedModel) -> None:
        """Start from a copy of a language model's trunk; the head starts at zero."""
        super().__init__()
        self.trunk = copy.deepcopy(lm.base_model)
        self.trunk.requires_grad_(True)  # the language model may be frozen already
        self.head = nn.Linear(lm.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._arguments = ForwardArguments(self.trunk)
        self.eval()

    def forward(self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
        """Return [B] float32 logits of right-padded sequences."""
        hidden_BLD = self.trunk(
            input_ids=input_ids_BL,
            attention_mask=attention_mask_BL,
            use_cache=False,
            **self._arguments.positions(attention_mask_BL),
        ).last_hidden_state
        last_B = attention_mask_BL.sum(dim=1) - 1
        rows = torch.arange(len(last_B), device=last_B.device)
        return self.head(hidden_BLD[rows, last_B]).squeeze(-1).float()


class ClassifierReward:
    """A classifier's belief that the text is positive, from −1 to 1: tanh(logit / 2) = 2 σ(logit) − 1."""

    def __init__(self, classifier: Classifier, pad_id: int) -> None:
        self._classifier = classifier
        self._pad_id = pad_id

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Return [B] float32 scores."""
        ids, mask = right_pad(rollout.token_ids(), self._pad_id)
        device = next(self._classifier.parameters()).device
        return torch.tanh(self._classifier(ids.to(device), mask.to(device)) / 2).cpu()
