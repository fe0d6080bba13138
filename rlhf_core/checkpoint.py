"""Folders that are there whole or not at all, and whose damage is noticed.

A folder is written beside its place, synced and renamed. ``manifest.json`` in it has the SHA-256 of every other file,
so a truncated, changed or missing file is named before anything is loaded.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_core.durable_files import errors_name, sync
from rlhf_core.runlog import parse_json

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, then put it in place of ``folder`` at once.

    Raises:
        OSError: the disk is full or read-only; what was there before stays.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with errors_name(folder):
            write(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {path.relative_to(partial).as_posix(): sha256(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=2) + "\n", encoding="utf-8")
        for path in (*files, partial / MANIFEST):
            sync(path)
        for path in sorted(partial.rglob("*")):
            if path.is_dir():
                sync(path)
        sync(partial)
        _put_in_place(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _raise_as_os_error(error, folder)
        raise
    sync(folder.parent)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; a folder that is there gives way, and returns when that fails.

    So does one that gave way when a process was killed between the two renames.
    """
    former = folder.with_name(f".{folder.name}.former")
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    try:
        partial.rename(folder)
    except BaseException:
        if former.exists():
            former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def _raise_as_os_error(error: BaseException, folder: Path) -> None:
    """Raise OSError for what safetensors and tokenizers raise in exceptions of their own when a disk is full."""
    found = _OS_ERROR.search(str(error))
    if found and not isinstance(error, OSError):
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(folder)) from None


def check_folder(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        ValueError: a file is missing, was changed, or is not in the manifest; the message names it.
    """
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable {MANIFEST} ({error})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder}: {MANIFEST} is not a table of files")
    for name, digest in sorted(manifest.items()):
        try:
            found = sha256(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{folder}: {name} is missing") from None
        except OSError as error:
            raise ValueError(f"{folder}: {name} cannot be read ({error.strerror})") from None
        if found != digest:
            raise ValueError(f"{folder}: {name} does not have the SHA-256 of the manifest; it was damaged or changed")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(there - manifest.keys() - {MANIFEST}):
        raise ValueError(f"{folder}: {name} is not in the manifest")


def is_sound(folder: Path) -> bool:
    """Return whether ``folder`` exists and agrees with its manifest."""
    try:
        check_folder(folder)
    except ValueError:
        return False
    return True


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step_{step:06d}"


def steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints as (step, folder), oldest first."""
    names = [(match, path) for path in checkpoints.glob("step_*") if (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted((int(match.group(1)), path) for match, path in names)


def newest_sound(checkpoints: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that agrees with its manifest; ``report`` hears of each damaged one passed over."""
    for _, folder in reversed(steps(checkpoints)):
        try:
            check_folder(folder)
        except ValueError as error:
            report(f"checkpoint passed over: {error}")
            continue
        return folder
    return None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a kill left half-written; step 0 always stays."""
    later = [folder for step, folder in steps(checkpoints) if step > 0]
    for folder in (*later[:-keep], *checkpoints.glob(".step_*")):
        shutil.rmtree(folder)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], path: Path) -> None:
    """Save an optimizer's per-parameter tensors, keyed ``<state>/<parameter name>``.

    Learning rates are not saved: the schedule gives them from the step.
    """
    tensors = {
        f"{key}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], path: Path) -> None:
    """Load what :func:`save_optimizer` saved.

    Raises:
        ValueError: a tensor belongs to no parameter, or is not of its shape.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for full_name, value in load_file(path).items():
        key, _, name = full_name.partition("/")
        if name not in by_name:
            raise ValueError(f"{path}: state {full_name!r} belongs to no parameter of this model")
        parameter = by_name[name]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(f"{path}: state {full_name!r} is {tuple(value.shape)}, and {tuple(parameter.shape)} here")
        # Adam's step counts live where torch put them: on the parameter's device for fused kernels.
        optimizer.state[parameter][key] = value.to(parameter.device)


def load_tensors(path: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a file's tensors, which must be those of ``wanted`` by name and shape.

    Raises:
        ValueError: one is missing, is too many or has another shape; the message names it.
    """
    found = load_file(path)
    for name in sorted(found.keys() ^ wanted.keys()):
        what = "is not there" if name in wanted else "is none of this configuration's"
        raise ValueError(f"{path}: {name} {what}; was the run's config.json changed?")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, and {tuple(wanted[name].shape)} by the configuration"
            raise ValueError(f"{path}: {name} is {shapes}; was the run's config.json changed?")
    return found


def read_numbers(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the numbers of a ``state.json`` by their names; none is negative, and an int serves as a float.

    Raises:
        ValueError: it is no JSON object, or a number is missing or of another type; the message names the field.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}; remove this checkpoint to continue from the one before"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__}; remove this checkpoint to continue from the one before"
        )
    for name, kind in kinds.items():
        value: Any = found.get(name)
        if type(value) not in (int, kind) or not 0 <= value < math.inf:
            said = repr(value) if name in found else "missing"
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(
                f"{path}: {name} is {said}; it must be {wanted} of 0 or more; "
                "remove this checkpoint to continue from the one before"
            )
    return found
