"""Data of any form as a store of tokens: read once, row by row, checked, counted and split.

The store is what training reads: it stays in the run's folder, so a resumed run no longer needs the source.

What is done with a row that cannot be used: ``stop`` ends the run and names it; ``skip`` counts it by its reason.
Repetitions are left out and counted, under either. Long rows: a completion is cut at the model's context, and has no
end-of-sequence token then; a prompt that leaves no room for a response is a row that cannot be used.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.dialogues import Chat
from rlhf_core.data.examples import Example, Need, example_of, held_out, need_of
from rlhf_core.data.records import RowError
from rlhf_core.data.sources import is_hub_name, read_records, source_files
from rlhf_core.data.token_store import Column, TokenWriter, mapped, read_numbers
from rlhf_core.data.tokenization import encode_text, untrained_tokenizer

Errors = Literal["stop", "skip"]
COLUMNS: dict[Need, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "demonstration": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
}
REPORT_FILE = "report.json"


@dataclass
class DataReport:
    """What became of the rows of a source."""

    source: str
    rows: int = 0
    used: int = 0
    held_out: int = 0
    repeated: int = 0
    cut: int = 0
    longest: int = 0
    """Tokens that a row may have."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows by the reason why they were left out."""
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first."""

    def refuse(self, where: str, error: RowError, errors: Errors) -> None:
        """Count an unusable row, or raise.

        Raises:
            ValueError: ``errors`` is ``stop``.
        """
        if errors == "stop":
            raise ValueError(f"{where}: {error}; correct the row, or leave such rows out with --data-errors skip")
        self.unusable[error.reason] += 1
        self.first.setdefault(error.reason, where)

    def __str__(self) -> str:
        parts = [f"{self.used - self.held_out:,} to train on", f"{self.held_out:,} held out"]
        if self.repeated:
            parts.append(f"{self.repeated:,} repeated and left out")
        if self.unusable:
            reasons = (f"{self.unusable[one]:,} {one}, first {self.first[one]}" for one in sorted(self.unusable))
            parts.append(f"{self.unusable.total():,} skipped ({'; '.join(reasons)})")
        if self.cut:
            parts.append(f"{self.cut:,} cut at {self.longest:,} tokens")
        return f"{self.source}: {self.rows:,} rows: {', '.join(parts)}"


def read_examples(
    source: str, need: Need, chat: Chat, errors: Errors, report: DataReport
) -> Iterator[tuple[str, Example]]:
    """Yield (where, example) of each usable row of a source.

    Raises:
        FileNotFoundError, ValueError: the source is missing or damaged, or a row is unusable under ``stop``.
    """
    for record in read_records(source):
        report.rows += 1
        try:
            if isinstance(record.value, RowError):
                raise record.value
            yield record.where, need_of(example_of(record.value, chat), need)
        except RowError as error:
            report.refuse(record.where, error, errors)


def build_store(
    source: str,
    need: Need,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    errors: Errors,
    held_out_share: float,
    cut_prompt: Callable[[str, int], str] | None = None,
) -> DataReport:
    """Write the rows of a source into an empty folder as tokens.

    Args:
        source: a file, a folder of files, or ``hub:NAME``.
        need: what the rows have to be.
        folder: where the store is written.
        tokenizer: makes the tokens, and renders messages.
        longest: tokens that prompt and completion may have together; for prompts alone, the longest prompt.
        errors: what an unusable row does.
        held_out_share: share of prompts whose rows are held out.
        cut_prompt: makes a prompt of a text, given its row's number from 0.

    Raises:
        FileNotFoundError, ValueError: the source is missing or damaged, a row is unusable under ``stop``, or no row is
            usable.
    """
    report = DataReport(source, longest=longest)
    keys, marks = array("Q"), bytearray()
    numbers = 2 if need == "pair" else 0
    chat = Chat(tokenizer)
    with TokenWriter(folder, COLUMNS[need], numbers) as writer:
        for where, example in read_examples(source, need, chat, errors, report):
            try:
                usable = _as_prompt(example, cut_prompt, report.rows - 1) if need == "prompt" else example
                row, cut = _fitted(_encoded(usable, tokenizer, need), tokenizer.eos_token_id, longest, need)
            except RowError as error:
                report.refuse(where, error, errors)
                continue
            writer.add(row, (example.margin, example.tie)[:numbers])
            report.cut += cut
            keys.append(int.from_bytes(usable.digest()[:8], "big"))
            marks.append(held_out(usable.group, held_out_share))
    chosen = np.sort(np.unique(np.frombuffer(keys, dtype=np.uint64), return_index=True)[1])
    marked = np.frombuffer(marks, dtype=np.uint8)[chosen]
    report.repeated = len(keys) - len(chosen)
    report.used, report.held_out = len(chosen), int(marked.sum())
    for name, value in (("train", 0), ("held_out", 1)):
        (folder / f"{name}.rows").write_bytes(chosen[marked == value].astype("<i8").tobytes())
    if not report.used:
        first = next(iter(report.first.values()), None)
        remedy = f"correct the rows: the first is {first}" if first else "give a source that holds rows"
        raise ValueError(f"no row of the data can be used: {report}; {remedy}")
    content = {
        "rows": report.rows, "used": report.used, "held_out": report.held_out, "repeated": report.repeated,
        "cut": report.cut, "longest": report.longest, "unusable": dict(report.unusable),
    }  # fmt: skip
    (folder / REPORT_FILE).write_text(json.dumps(content, sort_keys=True, indent=2) + "\n", encoding="utf-8")
    return report


def to_train_on(report: DataReport) -> DataReport:
    """Return the report of data that a model is trained on.

    Raises:
        ValueError: every row is held out.
    """
    if report.used == report.held_out:
        raise ValueError(f"no row of the data is left to train on: {report}; give more rows, or a smaller --held-out")
    return report


def _as_prompt(example: Example, cut_prompt: Callable[[str, int], str] | None, row: int) -> Example:
    """Return the prompt of an example alone; that of a text is its beginning."""
    if example.prompt:
        return Example(example.prompt, rendered=example.rendered)
    assert example.completion is not None
    prompt = cut_prompt(example.completion, row) if cut_prompt else ""
    if not prompt:
        raise RowError("too short", "the text gives no prompt; it has to have more than a few words")
    return Example(prompt)


def _encoded(example: Example, tokenizer: PreTrainedTokenizerBase, need: Need) -> dict[str, list[int]]:
    texts = (example.prompt, example.completion or "", example.rejected or "")
    rendered = example.rendered
    return {
        name: encode_text(tokenizer, text, rendered=rendered, begins=name == "prompt")
        for name, text in zip(COLUMNS[need], texts, strict=False)
    }


def _fitted(tokens: dict[str, list[int]], eos_id: int, longest: int, need: Need) -> tuple[dict[str, list[int]], bool]:
    """Return the row within the longest length, and whether something was cut.

    Raises:
        RowError: the prompt leaves no room or has no token, or two answers are equal when cut.
    """
    prompt, *answers = tokens.values()
    room = longest - len(prompt)
    if need == "prompt":
        if not prompt:
            raise RowError("no token", "the tokenizer has no token for the prompt")
        if room < 0:
            raise RowError(
                "prompt too long", f"{len(prompt)} tokens; with the response the context has room for {longest}"
            )
        return tokens, False
    if room < 1:
        raise RowError("prompt too long", f"{len(prompt)} tokens; the context has {longest}")
    if not all(answers):
        raise RowError("no token", "the tokenizer has no token for a completion")
    ended = [answer if answer[-1] == eos_id else [*answer, eos_id] for answer in answers]
    fitting = [answer[:room] for answer in ended]
    if need == "pair" and fitting[0] == fitting[1]:
        raise RowError("equal when cut", f"chosen and rejected are the same {longest} tokens")
    return dict(zip(tokens, [prompt, *fitting], strict=True)), fitting != ended


@dataclass(frozen=True)
class Rows:
    """The rows of one split of a store."""

    folder: Path
    numbers: np.ndarray
    """[rows] their places in the store."""

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> Column:
        """Return a column of tokens."""
        return Column(self.folder, name, self.numbers)

    def margins_and_ties(self) -> np.ndarray:
        """Return [rows, 2] margin and 0 or 1 for a tie."""
        return read_numbers(self.folder, 2)[self.numbers]


def open_rows(folder: Path, split: Literal["train", "held_out"]) -> Rows:
    """Return a split of a store that :func:`build_store` wrote."""
    return Rows(folder, mapped(folder / f"{split}.rows", "<i8"))


def texts_of(source: str, errors: Errors, most_characters: int = 100_000_000) -> Iterator[str]:
    """Yield the texts of a source, to train a tokenizer on, until so many characters have come: more tell little."""
    size = 0
    for _, example in read_examples(source, "prompt", Chat(untrained_tokenizer()), errors, DataReport(source)):
        for text in (example.prompt, example.completion, example.rejected):
            if text:
                size += len(text)
                yield text
        if size > most_characters:
            return


def fingerprint(source: str) -> dict[str, Any]:
    """Return the SHA-256 of a source's files by name; a hub data set is known by its name alone."""
    if is_hub_name(source):
        return {"hub": source}
    digests = {}
    for path in source_files(source):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
