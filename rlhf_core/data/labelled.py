"""Labelled sentences in a folder of text files, and the parts that a stable hash splits them into."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["reward", "evaluator", "held_out"]


@dataclass(frozen=True)
class Labelled:
    """A sentence and whether it is positive."""

    text: str
    positive: bool


def read_sentences(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file that hold something, stripped; a byte-order mark is no part of them.

    Raises:
        ValueError: the file is not UTF-8, or holds no sentence.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    sentences = [line.strip() for line in text.split("\n") if line.strip()]
    if not sentences:
        raise ValueError(f"{path} holds no sentence; it must have one a line")
    return sentences


def read_labelled(folder: Path) -> list[Labelled]:
    """Return the sentences of every ``*.pos`` and ``*.neg`` file of a folder, in the order of the files' names.

    A sentence that occurs twice is kept once, so that no split can see it from both sides; one that stands under both
    labels is kept under the first.

    Raises:
        FileNotFoundError: the folder, or one of the two kinds of file, is missing.
        ValueError: a file is empty or not UTF-8.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder {str(folder)!r}; give a folder with a *.pos and a *.neg file")
    found: dict[str, Labelled] = {}
    for suffix, positive in (("pos", True), ("neg", False)):
        paths = sorted(folder.glob(f"*.{suffix}"))
        if not paths:
            label = "positive" if positive else "negative"
            raise FileNotFoundError(f"{folder} has no *.{suffix} file; put the {label} sentences there, one a line")
        for path in paths:
            for text in read_sentences(path):
                found.setdefault(text, Labelled(text, positive))
    return list(found.values())


def part_of(text: str) -> Part:
    """Return which part of the data a sentence belongs to: a stable function of its content.

    A tenth is held out of everything; the rest is halved between the reward model and the evaluator.
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20
    if bucket < 2:
        return "held_out"
    return "reward" if bucket % 2 == 0 else "evaluator"


def split(sentences: Iterable[Labelled]) -> dict[Part, list[Labelled]]:
    """Return the sentences by part.

    Raises:
        ValueError: a part has no sentence of one of the labels.
    """
    parts: dict[Part, list[Labelled]] = {"reward": [], "evaluator": [], "held_out": []}
    for sentence in sentences:
        parts[part_of(sentence.text)].append(sentence)
    for name, members in parts.items():
        if len({member.positive for member in members}) < 2:
            raise ValueError(
                f"the part {name!r} of the data has {len(members)} sentences and not both labels; "
                "give more sentences (a few hundred of each label at the least)"
            )
    return parts
