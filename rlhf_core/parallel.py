"""Independent pieces of work on threads of their own, with results in the order of the pieces.

An operator that is split over threads waits for the slowest of them hundreds of times a step; a piece of work on each
thread waits once. Bits do not depend on the number of threads: a piece computes the same with any number of them
(:mod:`rlhf_core.layers`), and what is added up is added up in the order of the pieces.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from rlhf_core.numerics import is_portable

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def workers(device: torch.device) -> int:
    """Return how many pieces of work go on at once: torch's threads; one on a GPU and under portable numerics."""
    return 1 if device.type != "cpu" or is_portable() else torch.get_num_threads()


def together(work: Callable[[Piece], Result], pieces: Iterable[Piece], at_once: int) -> list[Result]:
    """Return ``work(piece)`` of every piece, up to ``at_once`` at a time, each on its share of torch's threads.

    Gradients are recorded as in the calling thread. The first error, in the order of the pieces, is raised when all
    have ended.
    """
    pieces = list(pieces)
    at_once = min(at_once, len(pieces))
    if at_once <= 1:
        return [work(piece) for piece in pieces]
    share, gradients = max(1, torch.get_num_threads() // at_once), torch.is_grad_enabled()

    def on_a_thread(piece: Piece) -> Result:
        torch.set_num_threads(share)
        with torch.set_grad_enabled(gradients):
            return work(piece)

    futures = [_pool(at_once).submit(on_a_thread, piece) for piece in pieces]
    results: list[Result] = []
    errors = [future.exception() for future in futures]
    for future, error in zip(futures, errors, strict=True):
        if error is not None:
            raise error
        results.append(future.result())
    return results


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rlhf")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
