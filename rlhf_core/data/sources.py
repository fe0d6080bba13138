"""What rows are read from: a data file, a folder of them, or a data set of the hub, each given as one word."""

import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.data.records import FORMS, Record, form_of, read_file, table_record

HUB = "hub:"


def is_hub_name(source: str) -> bool:
    """Return whether a source is ``hub:NAME`` or ``hub:NAME:SPLIT``."""
    return source.startswith(HUB)


def source_files(source: str) -> list[Path]:
    """Return the data files of a source: the file itself, or those of a folder by their names.

    Raises:
        FileNotFoundError: there is no such file, or no data file in the folder.
        ValueError: the file's name says no form that can be read.
    """
    path = Path(source)
    if path.is_dir():
        if not (files := data_files(path)):
            inside = next((one for one in sorted(path.iterdir()) if one.is_dir() and data_files(one)), None)
            hint = f"; its folder {str(inside)!r} has: give that one" if inside else ""
            raise FileNotFoundError(
                f"data folder {source!r} has neither *.pos and *.neg files nor a data file ({', '.join(FORMS)}){hint}"
            )
        return files
    if not path.is_file():
        hint = f"; for the hub write {HUB}{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise FileNotFoundError(f"no data file or folder {source!r}{hint}")
    if form_of(path) is None:
        raise ValueError(
            f"data file {source!r}: its name must end in one of {', '.join(FORMS)} (all but Parquet + .gz)"
        )
    return [path]


def data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder, by their names."""
    return sorted(one for one in folder.iterdir() if one.is_file() and form_of(one) and not one.name.startswith("."))


def read_records(source: str) -> Iterator[Record]:
    """Yield the rows of a file, of a folder's files in the order of their names, or of a hub data set.

    Raises:
        FileNotFoundError, ValueError: the source is missing, or a whole file is damaged; the message names it.
    """
    if is_hub_name(source):
        yield from _read_hub(source.removeprefix(HUB))
        return
    for path in source_files(source):
        yield from read_file(path)


def _read_hub(name: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{HUB}{name} needs the package datasets; install it with: pip install 'rlhf-systems-kit[hub]'"
        ) from None
    name, _, split = name.partition(":")
    split = split or "train"
    try:
        rows = iter(datasets.load_dataset(name, split=split, streaming=True))
    except Exception as error:  # whatever the hub, the network or the data set's files have to say
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{HUB}{name}:{split} cannot be loaded ({type(error).__name__}: {text})") from None
    for number, row in enumerate(rows, start=1):
        yield table_record(f"{HUB}{name}:{split}: row {number}", row)
