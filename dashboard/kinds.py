"""Which command made a run, and what that says of it: its steps, whether it is over, and which rules judge it."""

from pathlib import Path
from typing import Any

from dashboard.folder import plain_file, read_json
from rlhf_core import run_folder
from rlhf_core.alerting.rules import EXACT, FAST, QUESTIONS, STABLE

SUPERVISED = ("sft", "reward", "dpo")
JUDGED = {"eval": (EXACT,)} | dict.fromkeys(SUPERVISED, (EXACT, STABLE, FAST))
"""The questions whose rules fit another kind of run than a training with PPO, which the rules were made for."""
DATA_REPORT = ("data", "report.json")


def our_kind(config: dict[str, Any]) -> str | None:
    """Return the command that made a run, by its configuration; None where that is no configuration of ours.

    :func:`rlhf_core.run_folder.kind_of` takes one that says nothing for that of ``rlhf train``. Here such a folder may
    be the log of another trainer.
    """
    known = {"ppo", "training", "judging"} & config.keys()
    return run_folder.kind_of(config) if known else None


def judged_questions(kind: str | None) -> tuple[str, ...]:
    """Return the questions whose rules fit a kind of run."""
    return JUDGED.get(kind or "", QUESTIONS)


def planned_steps(run: Path, config: dict[str, Any]) -> int | None:
    """Return how many steps a run is to have: by its configuration or, where that leaves it open, by its data."""
    kind = our_kind(config)
    if kind == "train":
        return _count(config, "ppo", "steps")
    if kind in SUPERVISED:
        return _count(config, "training", "steps") or _steps_of_epochs(run, config)
    return _batches_to_judge(run, config) if kind == "eval" else None


def _steps_of_epochs(run: Path, config: dict[str, Any]) -> int | None:
    """Return as many steps as the epochs have: what is left over after the last whole batch is dropped."""
    epochs, size = _count(config, "training", "epochs"), _count(config, "training", "batch_size")
    used, held_out = _rows(run)
    rows = used - held_out
    return epochs * (rows // min(size, rows)) if epochs and size and rows > 0 else None


def _batches_to_judge(run: Path, config: dict[str, Any]) -> int | None:
    """Return the batches of an evaluation, the last of which may be smaller."""
    prompts, draws, size = (_count(config, "judging", name) for name in ("prompts", "best_of", "batch_size"))
    used, _ = _rows(run)
    return -(-min(prompts or used, used) * draws // size) if draws and size and used else None


def _rows(run: Path) -> tuple[int, int]:
    """Return how many rows of its data a run uses, and how many of them are held out; 0 where it has not been said."""
    report = read_json(run, *DATA_REPORT)
    return _count(report, "used") or 0, _count(report, "held_out") or 0


def _count(tree: Any, *names: str) -> int | None:
    """Return a whole number of nested tables that is not negative, or None."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if type(tree) is int and tree >= 0 else None


def ended(run: Path, kind: str | None, last_step: int | None, steps: int | None) -> bool | None:
    """Return whether a run has done its steps; None where nothing says how many those are.

    A supervised stage leaves its model at the end, and an evaluation its summary.
    """
    if kind in SUPERVISED:
        return plain_file(run, "model", "config.json") is not None
    if kind == "eval":
        return plain_file(run, run_folder.EVALUATION_FILE) is not None
    return None if steps is None else last_step is not None and last_step >= steps
