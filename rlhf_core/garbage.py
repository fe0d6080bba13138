"""Python's collector of garbage, out of the way where it only costs time. Imports no torch."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Do not look for cycles of garbage meanwhile: a hundred thousand new objects would have it done over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def loading_for_good() -> Iterator[None]:
    """Load torch and what a process needs beside it, and never look for garbage in that.

    Looking through the million objects of modules took a sixth of the time to load them, and a third of a second now
    and then later. In a process that had torch before, what is there may be garbage some day, and nothing is done.
    """
    if "torch" in sys.modules:
        yield
        return
    with garbage_left_alone():
        yield
        gc.freeze()
