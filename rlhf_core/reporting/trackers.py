"""A run's metrics sent to where people look at theirs already: TensorBoard, Weights & Biases, Trackio.

The same rows go to the run's own files whatever is sent; these libraries are extras, loaded only when asked for.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Destination = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "rlhf-systems-kit"


class Sink(Protocol):
    """One destination."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Send what is left."""


def require_installed(destinations: Sequence[Destination]) -> None:
    """Raise ValueError, with the extra to install, when a destination's library is not here."""
    for name in destinations:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report-to {name}: {name} is not installed; pip install 'rlhf-systems-kit[{name}]'")


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder."""

    def __init__(self, run: Path) -> None:
        """Open the file; what a resumed run has written already is followed by more."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Tracker:
    """Weights & Biases, or Trackio, which has the same three functions."""

    def __init__(self, library: str, run: Path, config: Mapping[str, Any]) -> None:
        """Begin a run of the same name there, with the same configuration."""
        self._library = importlib.import_module(library)
        self._library.init(project=PROJECT, name=run.resolve().name, config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step."""
        self._library.log(dict(values), step=step)

    def close(self) -> None:
        """Say that the run has ended."""
        self._library.finish()


SINKS: dict[Destination, Callable[[Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": lambda run, config: TensorBoard(run),
    "wandb": lambda run, config: Tracker("wandb", run, config),
    "trackio": lambda run, config: Tracker("trackio", run, config),
}


class Reporter:
    """Sends each step's metrics and timings to every destination that was asked for."""

    def __init__(self, destinations: Sequence[Destination], run: Path, config: Mapping[str, Any]) -> None:
        """Open them, each once."""
        self._sinks = [SINKS[name](run, config) for name in dict.fromkeys(destinations)]

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in self._sinks:
            sink.close()

    def after_step(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Send the rows that a step has logged, under their names there; what was not finite is left out."""
        if not self._sinks:
            return
        values = {name: value for name, value in {**timings, **metrics}.items() if _is_number(value)}
        values |= {f"stages_s/{name}": seconds for name, seconds in timings.get("stages_s", {}).items()}
        step = values.pop("step")
        for sink in self._sinks:
            sink.log(int(step), values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
