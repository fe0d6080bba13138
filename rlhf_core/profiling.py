"""Wall time of a step's stages."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class StageClock:
    """Adds up the seconds of named stages of one step; a stage inside another is named ``outer/inner``.

    What it measures goes to ``timings.jsonl`` alone: no clock reaches a file that has to be reproducible.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's wall time, waiting for the GPU at its ends."""
        self._open.append(name)
        full_name = "/".join(self._open)
        wait_for_gpu()
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for_gpu()
            self.seconds[full_name] = self.seconds.get(full_name, 0.0) + time.perf_counter() - start
            self._open.pop()

    def total(self) -> float:
        """Return the seconds of the outermost stages together."""
        return sum(seconds for name, seconds in self.seconds.items() if "/" not in name)


def wait_for_gpu() -> None:
    """Wait until the GPU has done what it was given; without one, do nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Return the largest memory allocated on the GPU so far, or without one the largest resident set of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss where it can be helped: a new program starts with that of the process that started it.
    if STATUS.is_file():
        lines = dict(line.partition(":")[::2] for line in STATUS.read_text(encoding="utf-8").splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
