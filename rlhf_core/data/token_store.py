"""Rows of tokens on disk, read by memory map: a data set may be larger than memory.

A column is two files: ``NAME.ids`` (int32, all rows one after the other) and ``NAME.ends`` (int64, where each ends).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, overload

import numpy as np

FLOATS = "numbers.f64"


class TokenWriter:
    """Appends rows to a store; a context manager."""

    def __init__(self, folder: Path, columns: Sequence[str], numbers: int = 0) -> None:
        """Begin a store in a folder.

        Args:
            folder: an empty folder.
            columns: names of the columns of tokens.
            numbers: float64 numbers beside each row.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, tuple[IO[bytes], IO[bytes]]] = {
            name: ((folder / f"{name}.ids").open("wb"), (folder / f"{name}.ends").open("wb")) for name in columns
        }
        self._ends = dict.fromkeys(columns, 0)
        self._numbers = (folder / FLOATS).open("wb") if numbers else None

    def add(self, row: Mapping[str, Sequence[int]], numbers: Sequence[float] = ()) -> None:
        """Append a row."""
        for name, (ids, ends) in self._files.items():
            ids.write(np.asarray(row[name], dtype="<i4").tobytes())
            self._ends[name] += len(row[name])
            ends.write(np.int64(self._ends[name]).tobytes())
        if self._numbers is not None:
            self._numbers.write(np.asarray(numbers, dtype="<f8").tobytes())

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for pair in self._files.values():
            for file in pair:
                file.close()
        if self._numbers is not None:
            self._numbers.close()


def mapped(path: Path, dtype: str) -> np.ndarray:
    """Return a file's numbers without reading them; an empty file cannot be mapped and needs not be."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class Column(Sequence[list[int]]):
    """Some rows of a column."""

    def __init__(self, folder: Path, name: str, rows: np.ndarray) -> None:
        """Open the rows of these numbers."""
        self._ids, self._ends = mapped(folder / f"{name}.ids", "<i4"), mapped(folder / f"{name}.ends", "<i8")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: int | slice) -> list[int] | list[list[int]]:
        """Return the tokens of a row, or of some."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        row = int(self._rows[place])
        start = int(self._ends[row - 1]) if row else 0
        tokens: list[int] = self._ids[start : int(self._ends[row])].tolist()
        return tokens

    def __iter__(self) -> Iterator[list[int]]:
        return (self[place] for place in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Return [rows] int64 numbers of tokens."""
        if not len(self._rows):
            return np.empty(0, np.int64)
        return np.diff(self._ends, prepend=0)[self._rows]


def read_numbers(folder: Path, each: int) -> np.ndarray:
    """Return [rows, each] the numbers beside the rows."""
    return mapped(folder / FLOATS, "<f8").reshape(-1, each)
