"""``rlhf alerts``."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.table import Table
from rich.text import Text

from rlhf_core import run_folder, runlog
from rlhf_core.alerting import readers
from rlhf_core.alerting.rules import BY_NAME, STALLED
from rlhf_core.alerting.thresholds import default_thresholds, read_thresholds
from rlhf_core.alerting.watch import number_in_words
from rlhf_core.alerts import Alert, Monitor, worst_first
from rlhf_core.commands.options import parse
from rlhf_core.config import TrainConfig
from rlhf_core.config_files import read_config_file
from rlhf_core.file_age import file_age_s
from rlhf_core.stage_config import require_training_run
from rlhf_core.terminal import console, printable

STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


@dataclass(frozen=True)
class Options:
    """Say what is going wrong in a run, since when, why, and what to do (exit code 1 when something critical stands).

    Reads runs of this trainer, and logs of TRL, OpenRLHF and verl with --format.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "latest"
    """A run: its name under --runs, or its folder. With another --format: the log, or the folder that holds it."""
    format: readers.Format = "rlhf"
    """Which trainer wrote the log: trl reads trainer_state.json, openrlhf and verl read JSONL or console output.
    Rows of these three that cannot be read are left out, and standard error says how many."""
    config: Path | None = None
    """A .toml file that changes severities and thresholds; the defaults are rlhf_core/alerts.toml."""
    json: bool = False
    """Print JSON."""
    runs: Path = Path("runs")
    """Where runs are kept."""


def run(arguments: list[str]) -> int:
    """Print the alerts; return the exit code."""
    options = parse(Options, arguments, "alerts")
    thresholds = default_thresholds() if options.config is None else read_thresholds(options.config)
    monitor, age_s, unlogged = Monitor(thresholds), None, list[Alert]()
    if options.format == "rlhf":
        folder = run_folder.find_run(options.run, options.runs)
        require_training_run(folder)
        columns, unlogged = _read_run(folder)
        age_s = _age_s(folder, columns)
    else:
        folder = Path(options.run)
        columns = readers.read_columns(folder, options.format, _note)
    monitor.extend(columns)
    alerts = worst_first([*monitor.alerts(age_s), *unlogged])
    if options.json:
        print(json.dumps(_as_json(folder, columns, alerts, monitor.not_checked()), indent=2, allow_nan=False))
    else:
        _print(columns["step"], alerts, monitor.not_checked())
    return int(any(alert.severity == "critical" and alert.standing for alert in alerts))


def _note(line: str) -> None:
    """Print a line on standard error, where it is no part of the JSON."""
    print(f"rlhf: {printable(line)}", file=sys.stderr)


def _read_run(folder: Path) -> tuple[Mapping[str, np.ndarray], list[Alert]]:
    """Return a run's columns, and the alert of a step that it gave up, which may have been its first."""
    logged = (folder / runlog.METRICS_FILE).is_file()
    if not logged and (unlogged := readers.unlogged_alerts(folder, last_step=0)):
        return {"step": np.empty(0, dtype=np.int64)}, unlogged
    columns = readers.read_columns(folder)
    last_step = int(columns["step"][-1]) if len(columns["step"]) else 0
    return columns, readers.unlogged_alerts(folder, last_step)


def _age_s(folder: Path, columns: Mapping[str, np.ndarray]) -> float | None:
    """Return how old a run's last row is; None for a run that has done its last step or has done none."""
    steps = columns["step"]
    config = read_config_file(folder / run_folder.CONFIG_FILE, TrainConfig())
    if not len(steps) or int(steps[-1]) >= config.ppo.steps:
        return None
    return file_age_s(folder / runlog.METRICS_FILE)


def _as_json(
    folder: Path, columns: Mapping[str, np.ndarray], alerts: Sequence[Alert], not_checked: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    steps = columns["step"]
    return {
        "run": str(folder),
        "rows": len(steps),
        "last_step": int(steps[-1]) if len(steps) else None,
        "alerts": [alert.to_json() for alert in alerts],
        "not_checked": {name: list(metrics) for name, metrics in not_checked.items()},
    }


def _print(steps: np.ndarray, alerts: Sequence[Alert], not_checked: Mapping[str, Sequence[str]]) -> None:
    seen = f"{len(steps)} rows, steps {steps[0]} to {steps[-1]}" if len(steps) else "no finished step"
    if not alerts:
        console.print(f"no alerts ({seen})", markup=False)
    else:
        console.print(_table(alerts, seen))
    if not_checked:
        lacking = sorted({metric for metrics in not_checked.values() for metric in metrics})
        console.print(
            f"not checked, for the log has no {', '.join(map(printable, lacking))}: {', '.join(not_checked)}",
            style="dim", markup=False, soft_wrap=True,
        )  # fmt: skip


def _table(alerts: Sequence[Alert], seen: str) -> Table:
    table = Table(title=f"alerts ({seen})", box=box.SIMPLE_HEAD, show_lines=True)
    table.add_column("alert", no_wrap=True)
    table.add_column("steps", no_wrap=True)
    table.add_column("value against threshold")
    table.add_column("what, why, what to do", ratio=1)
    for alert in alerts:
        rule = BY_NAME.get(alert.name, STALLED)
        name = Text(f"{alert.severity}\n", style=STYLES[alert.severity]) + Text(printable(alert.name), style="bold")
        until = f"{alert.first_step} to {alert.step}\n{'stands' if alert.standing else 'passed'}"
        against = "" if alert.threshold is None else f"\nagainst {number_in_words(alert.threshold)}"
        value = f"{number_in_words(alert.value)}{against}"
        text = Text.assemble(
            f"{rule.text}\n", (f"{printable(alert.evidence)}\n", "dim"), f"why: {rule.cause}\ndo: {rule.remedy}"
        )
        table.add_row(name, until, Text(f"{printable(alert.metric)}\n{value}"), text)
    return table
