"""Which of the states that TRL saved to a folder is the one to read. Imports no torch.

Each ``trainer_state.json`` has the whole log of its training so far, and no time. So the state with the highest step
has what the others have, as long as all are of one training; those of another, that was saved to the same folder, log
other values at the steps that both have.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_core import runlog


def newest_state(path: Path) -> Path:
    """Return the state of the highest step: a run that goes on leaves an older one in the folder that it saves to.

    Args:
        path: a ``trainer_state.json``, or a folder that holds some: its own, and those of its checkpoints.

    Raises:
        FileNotFoundError: there is none.
        ValueError: some are of another training than the one with the highest step.
    """
    if path.is_file():
        return path
    files = [path / "trainer_state.json", *sorted(path.glob("checkpoint-*/trainer_state.json"), key=_step)]
    found = [file for file in files if file.is_file()]
    if not found:
        raise FileNotFoundError(
            f"no trainer_state.json in {str(path)!r} nor in a checkpoint-N of it; give the folder that TRL saved to, "
            "or the file"
        )
    newest = max(found, key=_step)
    logged = dict(_logged(newest))
    parted = {file: place for file in found if (place := _first_difference(file, logged)) is not None}
    if parted:
        (step, name), others = next(iter(parted.values())), [_spelled(file, path) for file in parted]
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise ValueError(
            f"{str(path)!r} holds states of different trainings: {', '.join(others[:5])}{more} and "
            f"{_spelled(newest, path)} do not agree on the log, first on {name} at step {step}; give the "
            "trainer_state.json of the training that is meant, or move those of the other one away"
        )
    return newest


def read_state(file: Path) -> Any:
    """Return the JSON of a state.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return runlog.parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no trainer_state.json: {error}; it must be JSON with a log_history") from None


def _step(file: Path) -> int:
    """Return the step of a state: of a checkpoint the one in its name, which needs no reading."""
    if named := re.fullmatch(r"checkpoint-(\d+)", file.parent.name):
        return int(named[1])
    tree = read_state(file)
    step = tree.get("global_step") if isinstance(tree, dict) else None
    return step if type(step) is int else -1


def _logged(file: Path) -> Iterator[tuple[tuple[int, str], Any]]:
    """Yield (step, name) and value of what a state logs, the last first: a dictionary then keeps what came first.

    A state that is saved after an evaluation has it in addition, and the end of a training its summary.
    """
    try:
        tree = read_state(file)
    except ValueError:
        return  # only the one that is read has to be readable
    history = tree.get("log_history") if isinstance(tree, dict) else None
    for row in reversed(history if isinstance(history, list) else []):
        if isinstance(row, dict) and type(step := row.get("step")) is int:
            yield from (((step, name), value) for name, value in row.items() if name != "step")


def _first_difference(file: Path, logged: dict[tuple[int, str], Any]) -> tuple[int, str] | None:
    """Return the first step and name at which a state has another value; NaN is the same as NaN."""
    found = dict(_logged(file))
    return min(
        (place for place in found.keys() & logged.keys() if repr(found[place]) != repr(logged[place])), default=None
    )


def _spelled(file: Path, folder: Path) -> str:
    return file.relative_to(folder).parts[0]
