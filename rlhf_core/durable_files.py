"""Files that outlast a crash: written whole or not at all, and their names with them; errors say which file it was.

This module does not import torch.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Give an OSError of the block, such as a full disk, the path that it happened at."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, sync it and rename it over ``path``: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with errors_name(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make what a file holds durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
