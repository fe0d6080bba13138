"""Rows of a data file, one after the other: JSON lines, JSON, CSV, Parquet and text, gzipped or not.

Nothing here holds more of a file than a row, or a batch of rows of a Parquet file: a file may be larger than memory.
A row that cannot be read is a record too, whose value is a :class:`RowError`; who reads decides whether that stops.
"""

import csv
import gzip
import io
import json
import re
import typing
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LONGEST_ROW = 64 * 2**20
"""Bytes; what has no end within them is no row of text but some other file."""
CHUNK = 2**20
PARQUET_ROWS = 256


class RowError(ValueError):
    """A row cannot be used.

    Attributes:
        reason: the kind of damage, by which rows are counted.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """A row and where it stands."""

    where: str
    """``file:line``, or ``file: row N`` for files without lines; both count from 1."""
    value: dict[str, Any] | RowError


def form_of(path: Path) -> str | None:
    """Return the key of :data:`FORMS` by which a file is read; None where its name says no form."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    form = next(iter(suffixes[-2:-1] if zipped else suffixes[-1:]), "")
    return form if form in FORMS and not (zipped and form == ".parquet") else None


def read_file(path: Path) -> Iterator[Record]:
    """Yield the rows of a file whose name says a form.

    Raises:
        ValueError: the whole file is damaged; the message names it.
    """
    form = form_of(path)
    assert form is not None
    rows = 0
    try:
        for record in FORMS[form](path):
            rows += 1
            yield record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file after row {rows} ({error}); copy it again") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return typing.cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | RowError]]:
    """Yield (number, line) of lines that hold something, without a byte-order mark."""
    number, inside = 0, False
    while line := file.readline(LONGEST_ROW):
        ends = line.endswith(b"\n")
        if inside:  # the rest of a line that was too long
            inside = not ends
            continue
        number += 1
        if not ends and len(line) == LONGEST_ROW:
            inside = True
            yield number, RowError("too long to be a row", f"no end of line within {LONGEST_ROW >> 20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _text(line: bytes | RowError) -> str:
    if isinstance(line, RowError):
        raise line
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"byte {error.start + 1} is 0x{line[error.start]:02x}") from None


class _RowDecoder(json.JSONDecoder):
    """Notes what Python takes and JSON does not, rather than raise: where the row ends is known, and the next is read.

    Attributes:
        problem: what is wrong with the row that was read last.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=self._constant, parse_int=self._integer, object_pairs_hook=self._pairs)
        self.problem: RowError | None = None

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return the value that begins at a place, and where it ends."""
        self.problem = None
        return super().raw_decode(s, idx)

    def _constant(self, name: str) -> None:
        self.problem = RowError("NaN or infinity", f"{name} is not JSON")

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python reads no more than 4,300 digits
            self.problem = RowError("number too long", f"an integer has {len(digits)} digits")
            return 0

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
            self.problem = RowError("repeated key", f"{twice} stands twice, and which is meant cannot be known")
        return found

    def row(self, value: Any) -> dict[str, Any]:
        """Return the value that was read last, if it can be a row."""
        if self.problem is not None:
            raise self.problem
        return _object(value)


_DECODER = _RowDecoder()


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("not an object", f"the row is a {type(value).__name__}; it must be {{...}}")
    return value


def _json_object(line: bytes | RowError) -> dict[str, Any]:
    try:
        return _DECODER.row(_DECODER.decode(_text(line)))
    except json.JSONDecodeError as error:
        raise RowError("malformed JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise RowError("malformed JSON", "nested too deeply") from None


def _attempt(where: str, make: Callable[..., dict[str, Any]], *of: Any) -> Record:
    try:
        return Record(where, make(*of))
    except RowError as error:
        return Record(where, error)


def _read_text(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in _lines(file):
            yield _attempt(f"{path}:{number}", _text_row, line)


def _text_row(line: bytes | RowError) -> dict[str, Any]:
    return {"text": _text(line).strip()}


def _read_json_lines(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in _lines(file):
            yield _attempt(f"{path}:{number}", _json_object, line)


def _read_json(path: Path) -> Iterator[Record]:
    """Yield the members of an array; a file whose first character is no bracket holds JSON lines."""
    with _open(path) as file:
        start = file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"[":
        yield from _read_json_array(path)
    else:
        yield from _read_json_lines(path)


def _read_json_array(path: Path) -> Iterator[Record]:
    """Decode one member after the other from a window of the file."""
    with _open(path) as raw:
        # A byte that is not UTF-8 becomes a surrogate, which no text may hold: its row is refused, and not the file.
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape")
        window, at, number, ended = file.read(CHUNK).lstrip().removeprefix("["), 0, 0, False
        while True:
            at = re.compile(r"[\s,]*").match(window, at).end()  # type: ignore[union-attr]
            if window[at : at + 1] == "]":
                return
            where = f"{path}: row {number + 1}"
            try:
                if at == len(window):
                    raise json.JSONDecodeError("the array does not end", window, at)
                value, end = _DECODER.raw_decode(window, at)
                if end == len(window) and not ended:
                    raise json.JSONDecodeError("may go on", window, end)
                record = _attempt(where, _DECODER.row, value)
            except (json.JSONDecodeError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError) and _may_go_on(error, len(window))
                more = file.read(CHUNK) if cut and len(window) - at < LONGEST_ROW else ""
                if more:
                    window, at = window[at:] + more, 0
                    continue
                if cut and not ended and len(window) - at < LONGEST_ROW:
                    ended = True
                    continue
                msg = error.msg.removesuffix(" starting at") if isinstance(error, json.JSONDecodeError) else ""
                reason = msg or "nested too deeply"
                yield Record(where, RowError("malformed JSON", f"{reason}; the rest of the file cannot be read"))
                return
            yield record
            number, at = number + 1, end


def _may_go_on(error: json.JSONDecodeError, length: int) -> bool:
    """Return whether more text could mend what could not be decoded."""
    return error.msg.startswith(("Unterminated string", "Invalid \\")) or error.pos >= length - 16


class _RowLines:
    """The lines of a table; those of the row that is being read can be given again, all but the first."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._given: list[str] = []
        self._again: list[str] = []
        self.number = 0
        """Lines given so far."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else self._file.readline(LONGEST_ROW)
        if not line:
            raise StopIteration
        self.number += 1
        self._given.append(line)
        return line

    def begin_row(self) -> None:
        self._given.clear()

    def give_again(self) -> None:
        """Go back to the row's second line: a quote that is not closed must not swallow the rows behind it."""
        self._again += reversed(self._given[1:])
        self.number -= max(0, len(self._given) - 1)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(LONGEST_ROW)
    with _open(path) as raw:
        lines = _RowLines(io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise ValueError(f"{path}:1: malformed CSV ({error}); correct the header") from None
        if not any(name.strip() for name in header) or len(set(header)) < len(header):
            raise ValueError(f"{path}:1: the header is {header}; it must name each column once")
        while True:
            lines.begin_row()
            where = f"{path}:{lines.number + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                lines.give_again()
                rows = csv.reader(lines, delimiter=delimiter, strict=True)
                yield Record(where, RowError("malformed CSV", _about_quotes(error)))
                continue
            if cells:
                yield _attempt(where, _csv_row, header, cells)


def _about_quotes(error: csv.Error) -> str:
    text = str(error)
    ends = "unexpected end of data" in text
    return f"{text}: a quote opens and is not closed" if ends else text


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise RowError("wrong number of columns", f"{len(cells)} under a header of {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Mapped or buffered beforehand, a row group as large as the file would be in memory at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                for row in range(batch.num_rows):
                    number += 1
                    yield _attempt(f"{path}: row {number}", _parquet_row, batch, row)
    except (pyarrow.ArrowException, OSError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged Parquet file after row {number} ({text}); copy it again") from None


def _parquet_row(batch: Any, row: int) -> dict[str, Any]:
    try:
        [value] = batch.slice(row, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", error.reason) from None
    return _without_nulls(value)


def table_record(where: str, row: Any) -> Record:
    """Return the record of a table's row, without its empty cells: tables have every column in every row."""
    return _attempt(where, _without_nulls, row)


def _without_nulls(row: Any) -> dict[str, Any]:
    return {name: cell for name, cell in _object(row).items() if cell is not None}


FORMS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
"""Readers by the end of the file's name."""
