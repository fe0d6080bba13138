"""Stopping a run between two pieces of work, so that what it had is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run stopped before its end, and has saved what it had."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def by_signal(number: int, message: str) -> Stopped:
    """Return what is raised when a signal asked the run to stop; the exit code is the shell's for that signal."""
    return Stopped(128 + number, message)


def by_alert(message: str) -> Stopped:
    """Return what is raised when an alert stops the run; the exit code is that of ``rlhf alerts``."""
    return Stopped(1, message)


class StopRequest:
    """Remembers SIGTERM or Ctrl-C until the work at hand is done; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals inside the block and give them back to their former handlers after it."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        former = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def stop_between_stages(stop: StopRequest, stage: str) -> None:
    """Raise Stopped when a signal has arrived during a stage that keeps no checkpoint of its own."""
    if stop.signal_number is not None:
        raise by_signal(stop.signal_number, f"stopped during {stage}, which starts anew on resume")
