"""Numeric functions held to our oracles by ``pytest verification/m4_numerics --implementation MODULE:ADAPTER``.

An adapter is any object (a module, a class, a namespace) with some of these functions; a test of one that it lacks is
skipped and says so. Tensors in, tensors out; masks are bool, True = counts. What stands where a mask is False, NaN
included, must not change a result, and what a function puts there itself is not looked at; a function leaves its inputs
as they were. The mask can have holes, but for ``last_token_index``. The losses have a gradient to their first argument;
``entropy`` and ``kl`` have one or are constants.

========================  ==========================================================================================
``token_logprobs``        (logits [B, T, V], labels [B, T], temperature) → [B, T] log softmax(logits / temperature)
``entropy``               (logits [B, T, V]) → [B, T] in nats
``gae``                   (rewards, values, mask [B, T], gamma, lam) → advantages, returns [B, T]
``whiten``                (x, mask [B, T], shift_mean) → [B, T]
``masked_mean``           (x, mask [B, T]) → scalar
``last_token_index``      (mask [B, T]) → [B] place of each row's last True, of right-padded rows
``kl``                    (logp, ref_logp [B, T], estimator "k1", "k2" or "k3") → [B, T]
``policy_loss``           (logp, old_logp, advantages, mask [B, T], clip_range) → scalar, the mean over the mask
``value_loss``            (values, old_values, returns, mask [B, T], clip_range) → scalar, ½ the mean over the mask
========================  ==========================================================================================

``name`` is what the table calls it, and ``missing`` maps a function that it lacks to why.
"""

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FUNCTIONS = (
    "token_logprobs",
    "entropy",
    "gae",
    "whiten",
    "masked_mean",
    "last_token_index",
    "kl",
    "policy_loss",
    "value_loss",
)
KIT = "rlhf_core.testing.adapters.kit:adapter"


def load_implementation(spec: str) -> Any:
    """Return the adapter that ``module:attribute`` names.

    Raises:
        ValueError: there is no such module or attribute, or it offers none of the functions.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"--implementation is {spec!r}; give module:attribute, as in {KIT}")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as `python -m pytest` does and `pytest` does not
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever somebody's module does when it is imported
        raise ValueError(
            f"--implementation {spec!r} cannot be loaded: {type(error).__name__}: {error}; "
            "it is looked for in the working directory and among the installed modules"
        ) from None
    if not any(callable(getattr(found, name, None)) for name in FUNCTIONS):
        raise ValueError(f"--implementation {spec!r} has none of the functions {', '.join(FUNCTIONS)}")
    return found


def name_of(adapter: Any, spec: str) -> str:
    """Return what tables and messages call an adapter: its ``name``, or how it was asked for."""
    return str(getattr(adapter, "name", spec))


@dataclass
class Results:
    """What each test found, for the table: test to cell."""

    column: str
    cells: dict[str, str] = field(default_factory=dict)


def shown(error: float) -> str:
    """Return a largest error as the table has it; infinity stands for a NaN."""
    return "NaN" if error == math.inf else f"{error:.1e}"


HEAD = "check"


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of a markdown table that :func:`render_table` wrote: column to check to cell."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    if len(rows) < 2:
        return {}
    columns = rows[0][1:]
    return {column: {row[0]: row[at] for row in rows[2:]} for at, column in enumerate(columns, start=1)}


def render_table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a markdown table, a column for each implementation and a row for each check."""
    checks = list(dict.fromkeys(check for cells in columns.values() for check in cells))
    lines = [f"| {HEAD} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {check} | " + " | ".join(cells.get(check, "") for cells in columns.values()) + " |" for check in checks
    ]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- written by --write-table -->\n", "<!-- end -->\n"


def write_table(path: Path, results: Results) -> None:
    """Put an implementation's column into the table of a document; the other columns and the text stay.

    Raises:
        ValueError: the document has no place for the table.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else BEGIN + END
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no lines {BEGIN.strip()!r} and {END.strip()!r}, between which the table stands")
    before, rest = text.split(BEGIN, 1)
    table, after = rest.split(END, 1)
    columns = read_table(table) | {results.column: results.cells}
    path.write_text(before + BEGIN + render_table(columns) + END + after, encoding="utf-8")
