"""What scores a completion."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.data.batches import right_pad
from rlhf_core.data.tokenization import encode_text
from rlhf_core.policy import ForwardArguments
from rlhf_core.reward_functions import RewardFunction, call_function
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


class FunctionReward:
    """A Python function of prompts and completions; see :mod:`rlhf_core.reward_functions`."""

    def __init__(
        self, name: str, function: RewardFunction, tokenizer: PreTrainedTokenizerBase, timeout_s: float
    ) -> None:
        self._name, self._function = name, function
        self._tokenizer, self._timeout_s = tokenizer, timeout_s

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Return [B] float32 scores of the decoded texts.

        Raises:
            RewardError: the function failed.
        """
        prompts, completions = rollout_texts(self._tokenizer, rollout)
        scores = call_function(self._name, self._function, prompts, completions, self._timeout_s)
        return torch.tensor(scores, dtype=torch.float32)


def rollout_texts(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> tuple[list[str], list[str]]:
    """Return the texts of a rollout's prompts and of its responses, without special tokens."""
    responses = rollout.response_token_ids()
    prompts = [row[: len(row) - len(own)] for row, own in zip(rollout.token_ids(), responses, strict=True)]
    return decode(tokenizer, prompts), decode(tokenizer, responses)


class ModelReward:
    """A reward model's number for prompt and response."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        longest: int | None = None,
    ) -> None:
        """Take the policy's tokens as they are where both have one vocabulary; else its texts are tokenized anew.

        Of a row that has more than ``longest`` tokens the last ones are read.
        """
        self._longest = longest
        self._model, self._tokenizer, self._policy_tokenizer = model, tokenizer, policy_tokenizer
        self._same = tokenizer.get_vocab() == policy_tokenizer.get_vocab()

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Return [B] float32 rewards."""
        rows = rollout.token_ids() if self._same else self._tokenized_anew(rollout)
        if self._longest is not None:
            rows = [row[-self._longest :] for row in rows]
        ids, mask = right_pad(rows, self._tokenizer.pad_token_id)
        device = next(self._model.parameters()).device
        rewards_B: torch.Tensor = self._model(ids.to(device), mask.to(device))
        return rewards_B.cpu()

    def _tokenized_anew(self, rollout: Rollout) -> list[list[int]]:
        prompts, completions = rollout_texts(self._policy_tokenizer, rollout)
        return [
            encode_text(self._tokenizer, prompt, begins=True)
            + encode_text(self._tokenizer, completion)
            + [self._tokenizer.eos_token_id] * int(ended)
            for prompt, completion, ended in zip(prompts, completions, rollout.ended_B.tolist(), strict=True)
        ]


class WeightedRewards:
    """Σ weight · reward over named rewards; ``parts`` has the [B] unweighted scores of the latest call by name."""

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]]) -> None:
        self.rewards = dict(rewards)
        self.parts: dict[str, torch.Tensor] = {}

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        """Return [B] float32 sums, in the order that the rewards were given in."""
        self.parts = {name: reward(rollout).float().cpu() for name, (_, reward) in self.rewards.items()}
        total_B = torch.zeros(len(rollout.ended_B))
        for name, (weight, _) in self.rewards.items():
            total_B += weight * self.parts[name]
        return total_B
