"""Short real trainings for the calibration of the alerts: the trainer itself, on the embedded task, tiny models.

A run is a configuration, a seed and at most one fault that begins at a step; its result is the rows that
``metrics.jsonl`` would hold, and the alert that the trainer itself raises when it stops for what is not finite.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from calibration_faults import FAULTS
from transformers import PreTrainedModel

from rlhf_core import ppo, updates
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import Alert, Monitor, check, nonfinite_alert
from rlhf_core.config import ModelConfig, PPOConfig, PretrainConfig, SamplingConfig, TrainConfig
from rlhf_core.data import reviews
from rlhf_core.data.batches import prompt_rows
from rlhf_core.data.tokenization import encode_prompts, encode_sentences
from rlhf_core.finite import NonFiniteError
from rlhf_core.metrics import log_row
from rlhf_core.policy import ActorCritic, Reference, build_model
from rlhf_core.reward import TextReward
from rlhf_core.seeding import set_all_seeds
from rlhf_core.sft import train_language_model
from rlhf_core.tasks import Task, load_task
from rlhf_core.trainer_state import new_state

STEPS = 30
LATE = 9
"""The step at which a fault begins that does not begin with the run."""
PRETRAIN_STEPS = 250
WITHIN = 10
"""Steps from its beginning within which a fault has to be seen."""

_LLAMA = ModelConfig(architecture="llama", layers=2, hidden_size=48, heads=2, context=32)
_GPT2 = ModelConfig(architecture="gpt2", layers=2, hidden_size=48, heads=2, context=32)

CONFIGURATIONS = {
    "llama, separate value": TrainConfig(
        seed=0,
        threads=1,
        model=_LLAMA,
        sampling=SamplingConfig(max_new_tokens=16),
        ppo=PPOConfig(
            steps=STEPS, batch_size=48, minibatch_size=16, micro_batch_size=16, epochs=3, learning_rate=1e-3,
            schedule="constant", kl_coef=0.05,
        ),
    ),
    "gpt2, shared value": TrainConfig(
        seed=0,
        threads=1,
        model=replace(_GPT2, value="shared"),
        sampling=SamplingConfig(max_new_tokens=16),
        ppo=PPOConfig(
            steps=STEPS, batch_size=48, minibatch_size=12, micro_batch_size=12, epochs=2, learning_rate=1e-3,
            schedule="constant", kl_control="fixed", kl_coef=0.05, lam=1.0,
        ),
    ),
    "llama, temperature 0.9": TrainConfig(
        seed=0,
        threads=1,
        model=_LLAMA,
        sampling=SamplingConfig(max_new_tokens=12, temperature=0.9),
        ppo=PPOConfig(
            steps=STEPS, batch_size=48, minibatch_size=12, micro_batch_size=6, epochs=2, learning_rate=2e-3,
            kl_coef=0.1, kl_target=6.0, gamma=0.99, missing_eos_penalty=1.0,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a run logged."""

    rows: list[dict[str, Any]]
    stopped_at: int | None
    """The step in which the trainer met something that is not finite."""


@functools.cache
def embedded_task() -> Task:
    return load_task(TrainConfig(seed=0))


@functools.cache
def base_model(architecture: str) -> PreTrainedModel:
    """A language model that writes the embedded task's sentences most of the time; trained once a process."""
    config = next(one for one in CONFIGURATIONS.values() if one.model.architecture == architecture)
    torch.set_num_threads(1)
    set_all_seeds(0)
    task = embedded_task()
    model = build_model(config.model, task.tokenizer)
    sequences = encode_sentences(task.tokenizer, task.texts()[:4000], config.model.context)
    train_language_model(
        model, sequences, PretrainConfig(batch_size=32, learning_rate=5e-3), steps=PRETRAIN_STEPS,
        pad_id=task.tokenizer.pad_token_id, seed=0, report=lambda loss: None,
    )  # fmt: skip
    return model


@functools.cache
def prompts() -> list[list[int]]:
    task = embedded_task()
    return encode_prompts(task.tokenizer, task.prompts)


@functools.cache
def run(configuration: str, seed: int, fault: str | None = None, begins: int = 1, steps: int = STEPS) -> Result:
    """Train, with the fault planted from step ``begins`` on."""
    return Result(*_train(configuration, seed, fault, begins, steps, enough=lambda row: False))


def raised_at(configuration: str, seed: int, fault: str, begins: int, expected: tuple[str, ...]) -> int | None:
    """Train until one of the expected alerts is raised, at most ten steps from the fault on; return its step."""
    monitor = Monitor(default_thresholds())
    seen: list[int] = []

    def enough(row: dict[str, Any]) -> bool:
        raised = monitor.extend(columns([row]))
        seen.extend(alert.raised_step for alert in raised if alert.name in expected)
        return bool(seen)

    _, stopped_at = _train(configuration, seed, fault, begins, begins + WITHIN, enough)
    return stopped_at if "nonfinite" in expected else min(seen, default=None)


def _train(
    configuration: str, seed: int, fault: str | None, begins: int, steps: int, enough: Callable[[dict[str, Any]], bool]
) -> tuple[list[dict[str, Any]], int | None]:
    config = replace(CONFIGURATIONS[configuration], seed=seed)
    task = embedded_task()
    set_all_seeds(seed)
    base = base_model(config.model.architecture)
    policy = copy.deepcopy(base).requires_grad_(True)
    state = new_state(ActorCritic(policy, config.model.value), Reference(copy.deepcopy(base)), config)
    reward = TextReward(reviews.score, task.tokenizer)
    eos_id, pad_id = task.tokenizer.eos_token_id, task.tokenizer.pad_token_id
    rows: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch, state, config, eos_id, reward)
        while state.step < steps:
            step = state.step + 1
            if fault is not None and step == begins:
                FAULTS[fault].plant(world)
            ids = [prompts()[row] for row in prompt_rows(len(prompts()), config.ppo.batch_size, step, seed)]
            try:
                result = ppo.ppo_step(state, ids, world.reward, world.config, eos_id=eos_id, pad_id=pad_id)
            except NonFiniteError as error:
                return rows, error.step
            rows.append(log_row(step, result.metrics))
            if enough(rows[-1]):
                break
    return rows, None


def alerts_of(result: Result) -> list[Alert]:
    """What the rows show, and what the trainer says of the step that it gave up."""
    thresholds = default_thresholds()
    shown = check(columns(result.rows), thresholds) if result.rows else []
    given_up = result.stopped_at
    return shown if given_up is None else [*shown, nonfinite_alert(given_up, "the step", thresholds)]


@dataclass
class World:
    """What a fault may change."""

    patch: pytest.MonkeyPatch
    state: updates.PPOState
    config: TrainConfig
    eos_id: int
    reward: Callable[..., torch.Tensor]


def columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The rows as columns; null is NaN, as a log's reader has it."""
    names = [name for name in rows[0] if name not in ("nonfinite", "step")]
    found = {name: np.array([np.nan if row[name] is None else row[name] for row in rows]) for name in names}
    return {"step": np.array([row["step"] for row in rows])} | found
