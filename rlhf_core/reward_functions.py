"""Rewards that are Python functions: found by name, called on a batch with a time limit, their answers checked.

``module:function`` names any function with ``function(prompts, completions) -> numbers``, two lists of texts in and one
finite number a completion out. Modules are looked for in the working directory first.

The time limit is an interval timer of the process (SIGALRM): it interrupts Python code and waiting system calls, and
does so again until the function gives in. Native code that does not return to Python is not interrupted, and off the
main thread, where Python hears no signals, there is no limit.
"""

import importlib
import inspect
import math
import numbers
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from rlhf_core.config_checks import LARGEST_FLOAT32

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class RewardError(ValueError):
    """A reward function failed; the message names it."""


class _TimeIsUp(BaseException):
    """No Exception, so that a function that catches all of those is stopped too."""


def load_function(name: str) -> RewardFunction:
    """Return the function ``module:function``.

    Raises:
        ValueError: there is no such module or function, the module cannot be imported, or it is not callable.
    """
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with _torch_as_it_was():
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise ValueError(f"reward {name!r}: {module_name} cannot be imported ({error})") from None
        raise ValueError(
            f"reward {name!r}: no module {error.name!r} in the working directory or among the installed ones"
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {name!r}: {module_name} cannot be imported ({_told(error)})") from None
    for part in function_name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"reward {name!r}: {module_name} has no {function_name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"reward {name!r} is a {type(found).__name__}; it must be a function of prompts and completions"
        )
    function: RewardFunction = found
    return function


def call_function(
    name: str, function: RewardFunction, prompts: list[str], completions: list[str], timeout_s: float
) -> list[float]:
    """Return the function's scores of a batch.

    Raises:
        RewardError: it raised, took longer than ``timeout_s``, or did not return one finite number a completion.
    """
    try:
        with _torch_as_it_was():
            scores = _called_within(timeout_s, function, list(prompts), list(completions))
    except _TimeIsUp:
        raise RewardError(
            f"reward function {name} took longer than {timeout_s:g} s for {len(completions)} completions; "
            "make it faster, or raise --reward-timeout-s"
        ) from None
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward function {name} raised {_told(error)}") from None
    return _checked(name, scores, len(completions))


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Put back what a user's code may change of torch: whether gradients are kept, and the default dtype."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


def _checked(name: str, scores: Any, wanted: int) -> list[float]:
    if inspect.iscoroutine(scores):
        scores.close()  # or Python says later that nobody waited for it
        raise RewardError(f"reward function {name} is async; it must be a plain function")
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward function {name} returned a {type(scores).__name__}; it must be a list, one number a completion"
        )
    if len(values) != wanted:
        raise RewardError(f"reward function {name} returned {len(values)} scores for {wanted} completions")
    return [_number(name, value, place) for place, value in enumerate(values)]


def _number(name: str, value: Any, place: int) -> float:
    """Return a score as a number: True and False are 1 and 0, a tensor or an array of one number is that number."""
    if hasattr(value, "item") and not getattr(value, "ndim", 0):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward function {name} returned {_short(value)} ({type(value).__name__}) for completion {place}; "
            "it must be a number"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST_FLOAT32:  # rewards are kept in float32
        raise RewardError(
            f"reward function {name} returned {_short(value)} for completion {place}; it must be finite in float32"
        )
    return number


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def _told(error: BaseException) -> str:
    """Return an exception in words, with the place in the user's code."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename != __file__]
    frames = [one for one in frames if not one.filename.startswith("<frozen importlib")]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {error.filename}:{error.lineno}"
    return f"{type(error).__name__}: {error}{place}"


def _called_within(seconds: float, function: RewardFunction, *batch: list[str]) -> Any:
    """Return what a function returns of a batch.

    Raises:
        _TimeIsUp: it took longer, and gave in.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*batch)

    def call() -> Any:
        return function(*batch)

    def up(number: int, frame: FrameType | None) -> None:
        # An alarm that comes when the function has just returned must not keep what follows from taking the timer away.
        if _is_inside(frame, call.__code__):
            raise _TimeIsUp

    former = signal.signal(signal.SIGALRM, up)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _is_inside(frame: FrameType | None, code: CodeType) -> bool:
    """Return whether a frame runs this code, or was called from there."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
