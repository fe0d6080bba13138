"""Supervised training in a run's folder: ``rlhf sft`` and ``rlhf reward`` are this loop with an objective each.

Like PPO it is a function of its configuration: the batch of a step is one of (seed, step), checkpoints hold weights,
optimizer and random generators, and a killed run continues to the same bytes.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from rlhf_core import checkpoint, runlog
from rlhf_core.data.batches import batches
from rlhf_core.metrics import Metric, stage_row
from rlhf_core.optim import adamw, clip_gradients, gradients, set_learning_rate, total_norm
from rlhf_core.profiler import timing_row
from rlhf_core.profiling import StageClock
from rlhf_core.seeding import rng_state, set_rng_state
from rlhf_core.sft import warmup_then_linear
from rlhf_core.stage_config import TrainingConfig
from rlhf_core.stopping import StopRequest, by_signal
from rlhf_core.terminal import console, progress_bar


class Objective(Protocol):
    """What is learned from rows of data."""

    @property
    def model(self) -> torch.nn.Module:
        """What is trained."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What a step's row of ``metrics.jsonl`` has."""
        ...

    def lengths(self) -> Sequence[int]:
        """Return the tokens of each row."""
        ...

    def units(self, rows: Sequence[int]) -> int:
        """Return over how many tokens, or pairs, the loss of these rows is a mean."""
        ...

    def losses(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss summed over the rows' units, and sums of other figures by the metric's name."""
        ...


@dataclass
class SupervisedState:
    """What a step changes."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""


def number_of_steps(config: TrainingConfig, rows: int) -> int:
    """Return the optimizer steps of a training on so many rows."""
    if config.steps is not None:
        return config.steps
    return config.epochs * (rows // min(config.batch_size, rows))


def supervised_step(
    state: SupervisedState, rows: Sequence[int], objective: Objective, config: TrainingConfig, lr: float
) -> dict[str, float]:
    """Do one optimizer step on a batch and return its figures: means over the batch's units.

    Each micro-batch is divided by the units of the whole batch, so the gradient does not depend on the split.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the weights are as they were before.
    """
    step, units = state.step + 1, objective.units(rows)
    total, sums = 0.0, dict[str, float]()
    for start in range(0, len(rows), config.micro_batch_size):
        loss, figures = objective.losses(rows[start : start + config.micro_batch_size])
        (loss / units).backward()
        total += loss.item()
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
    grads = gradients(state.model.parameters())
    norm = total_norm(grads)
    for name, number in (("loss", total), ("gradient norm", norm)):
        if not math.isfinite(number):
            lower = "lower --training.learning-rate, or that of the stage in a pipeline"
            raise FloatingPointError(f"step {step}: the {name} is {number}; {lower}")
    clip_gradients(grads, norm, config.max_grad_norm)
    set_learning_rate(state.optimizer, lr)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step = step
    means = {name: value / units for name, value in sums.items()}
    return {"loss": total / units, "grad_norm": norm, "lr": lr, "units": units, **means}


def run_supervised(
    title: str,
    objective: Objective,
    config: TrainingConfig,
    run: Path,
    stop: StopRequest,
    *,
    seed: int,
    peak_rate: float,
) -> SupervisedState:
    """Do what is left of a training in a run's folder, with logs and checkpoints.

    Raises:
        Stopped: a signal arrived; the state is saved.
        FloatingPointError: the loss is not finite; earlier checkpoints stay.
    """
    state = _start_or_resume(objective.model, config, run)
    lengths = objective.lengths()
    steps = number_of_steps(config, len(lengths))
    order = itertools.islice(batches(lengths, config.batch_size, seed, title), state.step, steps)
    with progress_bar(title, steps, done=state.step) as bar:
        for rows in order:
            clock = StageClock(state.step + 1)
            rate = peak_rate * warmup_then_linear(state.step, steps)
            with clock.stage("update"):
                figures = supervised_step(state, rows, objective, config, rate)
            with clock.stage("logging"):
                runlog.append(run / runlog.METRICS_FILE, [stage_row(state.step, figures, objective.metrics)])
            if state.step == steps or stop.signal_number is not None or state.step % config.save_every == 0:
                with clock.stage("checkpoint"):
                    _save(state, run, config.keep)
            clock.stop(int(sum(lengths[row] for row in rows)))
            runlog.append(run / runlog.TIMINGS_FILE, [timing_row(clock)])
            bar.advance(f"loss {figures['loss']:.4f}")
            if stop.signal_number is not None and state.step < steps:
                raise by_signal(stop.signal_number, f"stopped after step {state.step} of {steps}, saved")
    return state


def _start_or_resume(model: torch.nn.Module, config: TrainingConfig, run: Path) -> SupervisedState:
    """Return the newest sound checkpoint's state, or a new one saved as step 0; logs are cut back to it."""
    optimizer = adamw(model.parameters(), lr=0.0, beta2=0.99, eps=1e-8, weight_decay=config.weight_decay)
    state = SupervisedState(model, optimizer)
    checkpoints = run / "checkpoints"
    newest = checkpoint.newest_sound(checkpoints, report=lambda line: console.print(line, markup=False, soft_wrap=True))
    if newest is None:
        if checkpoint.steps(checkpoints):
            console.print("no checkpoint is sound; starting over at step 0")
        _save(state, run, config.keep)
    else:
        _load_weights(model, newest / "model.safetensors")
        checkpoint.load_optimizer(optimizer, _names(model), newest / "optimizer.safetensors")
        set_rng_state(load_file(newest / "rng.safetensors"))
        state.step = checkpoint.read_numbers(newest / "state.json", {"step": int})["step"]
        console.print(f"continuing after step {state.step} from {newest}", markup=False, soft_wrap=True)
    runlog.cut_back(run, state.step, {runlog.METRICS_FILE: state.step, runlog.TIMINGS_FILE: state.step - 1})
    return state


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    try:
        load_model(model, path)
    except RuntimeError as error:  # a name or a shape
        why = " ".join(str(error).split())
        raise ValueError(f"{path} is of another model: {why}; was the run's config.json changed?") from None


def _save(state: SupervisedState, run: Path, keep: int) -> None:
    def write(folder: Path) -> None:
        save_model(state.model, str(folder / "model.safetensors"))
        checkpoint.save_optimizer(state.optimizer, _names(state.model), folder / "optimizer.safetensors")
        save_file(rng_state(), folder / "rng.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": state.step}) + "\n", encoding="utf-8")

    checkpoint.write_folder(checkpoint.step_folder(run / "checkpoints", state.step), write)
    checkpoint.prune(run / "checkpoints", keep)


def _names(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def width_rate(rate: float | None, base: float, hidden_size: int) -> float:
    """Return the peak rate: the given one, else ``base`` at width 96 and less in proportion for wider models.

    Adam's best rate of a matrix falls with the width (Yang et al., "Tensor Programs V", 2022).
    """
    return base * (96 / hidden_size) if rate is None else rate
