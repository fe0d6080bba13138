"""The rewards that ``--reward`` names: folders of reward models, Python functions, weighted."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.config import RunConfig
from rlhf_core.data.tokenization import check_vocabulary, load_tokenizer
from rlhf_core.policy import context_length
from rlhf_core.reward import FunctionReward, ModelReward, Reward, WeightedRewards
from rlhf_core.reward_functions import RewardFunction, load_function
from rlhf_core.reward_model import RewardModel, load_reward_model

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
MODEL = "model:"


@dataclass(frozen=True)
class RewardSource:
    """A reward as it was asked for: ``name`` is what it is called in logs."""

    name: str
    weight: float
    folder: str | None
    """The reward model, or None for a function."""


def parse_reward(text: str) -> RewardSource:
    """Return what ``FOLDER``, ``model:FOLDER`` or ``module:function`` says, ``=WEIGHT`` behind it or not.

    Raises:
        ValueError: the weight is no finite number, or it is neither a folder nor a function's name.
    """
    name, equals, number = text.rpartition("=")
    if not equals or (Path(text).exists() and not name.strip()):
        name, number = text, "1"
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(f"--reward {text!r}: the weight {number!r} is no number; write NAME=0.5") from None
    if not math.isfinite(weight):
        raise ValueError(f"--reward {text!r}: the weight must be finite")
    folder = name.removeprefix(MODEL)
    if name.startswith(MODEL) or (name.strip() and Path(name).is_dir()):
        return RewardSource(Path(folder).name or folder, weight, folder)
    if _FUNCTION.fullmatch(name):
        return RewardSource(name, weight, None)
    raise ValueError(
        f"--reward {text!r}: there is no such folder, and it is no module:function; "
        "give the folder of a reward model, or a function of prompts and completions"
    )


@dataclass(frozen=True)
class LoadedReward:
    """A reward model with its tokenizer, or a function."""

    source: RewardSource
    found: RewardFunction | tuple[RewardModel, PreTrainedTokenizerBase]


def load_rewards(config: RunConfig, attention: str) -> list[LoadedReward]:
    """Load what ``config.reward`` names.

    Raises:
        FileNotFoundError, ValueError: one of them cannot be loaded, or two have one name.
    """
    loaded: list[LoadedReward] = []
    for text in config.reward:
        source = parse_reward(text)
        if any(one.source.name == source.name for one in loaded):
            raise ValueError(f"--reward {text!r}: there are two rewards {source.name!r}; give each once")
        if source.folder is None:
            loaded.append(LoadedReward(source, load_function(source.name)))
            continue
        model, tokenizer = load_reward_model(source.folder, attention), load_tokenizer(source.folder)
        check_vocabulary(tokenizer, model.model.config.get_text_config().vocab_size)
        loaded.append(LoadedReward(source, (model, tokenizer)))
    return loaded


def weighted(
    loaded: list[LoadedReward], tokenizer: PreTrainedTokenizerBase, timeout_s: float, device: torch.device
) -> WeightedRewards:
    """Return the weighted sum of loaded rewards for a policy with this tokenizer."""
    rewards: dict[str, tuple[float, Reward]] = {}
    for one in loaded:
        if isinstance(one.found, tuple):
            model, own = one.found
            reward: Reward = ModelReward(model.to(device), own, tokenizer, context_length(model.model))
        else:
            reward = FunctionReward(one.source.name, one.found, tokenizer, timeout_s)
        rewards[one.source.name] = (one.source.weight, reward)
    return WeightedRewards(rewards)
