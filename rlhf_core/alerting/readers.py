"""Logs of this trainer and of others as columns for the alerts: TRL, OpenRLHF, verl. Imports no torch.

A column is a masked array: masked where a row does not have the metric, NaN where its value was not finite. What
another trainer logs under a name of its own gets this project's name where it means the same; the rest keeps its own.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_core import runlog
from rlhf_core.alerting.alert import Alert

Format = Literal["rlhf", "trl", "openrlhf", "verl"]
Row = dict[str, float]
Columns = dict[str, np.ndarray]


def read_columns(path: Path, kind: Format = "rlhf") -> Columns:
    """Return a log's columns.

    Args:
        path: a run's folder, or for another trainer its log: a folder that holds one, or the file.
        kind: which trainer wrote it.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: it is not one of that trainer; the message names the file, the line and what is wrong.
    """
    if kind == "rlhf":
        return columns_of(run_rows(path))
    rows = {"trl": _trl_rows, "openrlhf": _openrlhf_rows, "verl": _verl_rows}[kind](path)
    return columns_of(_merged(rows))


def columns_of(rows: Iterable[Row]) -> Columns:
    """Return rows as columns; every row has a ``step``."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns: Columns = {}
    for name in names:
        values = np.array([row.get(name, 0.0) for row in rows], dtype=np.float64)
        columns[name] = np.ma.masked_array(values, mask=[name not in row for row in rows])
    return columns | {"step": np.array([row["step"] for row in rows], dtype=np.int64)}


# -- this project's runs -----------------------------------------------------------------------------------------------


def run_rows(run: Path) -> Iterator[Row]:
    """Yield the rows of a run's metrics with its timings; a last line that is being written is left out.

    Raises:
        FileNotFoundError: it has no metrics.
        ValueError: a line is malformed; the message names the file and the line.
    """
    timings = {int(row["step"]): row for row in _own_rows(run / runlog.TIMINGS_FILE)} if _has_timings(run) else {}
    for row in _own_rows(run / runlog.METRICS_FILE):
        yield timings.get(int(row["step"]), {}) | row


def unlogged_alerts(run: Path, last_step: int) -> list[Alert]:
    """Return the alerts of alerts.jsonl that the metrics cannot show: of a step that the trainer gave up.

    Raises:
        ValueError: a line is malformed; the message names the file and the line.
    """
    path, found = run / runlog.ALERTS_FILE, []
    for number, line in _whole_lines(path) if path.is_file() else ():
        row = runlog.decode_row(line, f"{path}:{number}")
        if row["step"] > last_step:
            try:
                found.append(Alert.from_json(row))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return found


def _has_timings(run: Path) -> bool:
    return (run / runlog.TIMINGS_FILE).is_file()


def _own_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"no log {str(path)!r}; is {str(path.parent)!r} a run that has begun its steps?")
    for number, line in _whole_lines(path):
        yield metrics_of(runlog.decode_row(line, f"{path}:{number}"), f"{path}:{number}")


def metrics_of(row: Mapping[str, Any], where: str) -> Row:
    """Return the numbers of a row of metrics.jsonl or timings.jsonl; null, which stands for NaN or infinity, is NaN.

    Raises:
        ValueError: a value is neither a number nor null.
    """
    numbers: Row = {}
    for name, value in row.items():
        if isinstance(value, dict | list):
            continue
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a number or null")
        numbers[name] = np.nan if value is None else float(value)
    return numbers


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and line.strip():
                yield number, line


# -- other trainers ----------------------------------------------------------------------------------------------------


def _same(value: float) -> float:
    return value


def _square(value: float) -> float:
    return value * value


def _rest(value: float) -> float:
    return 1.0 - value


Names = Mapping[str, tuple[str, Callable[[float], float]]]

TRL: Names = {
    "objective/kl": ("kl", _same),
    "objective/scores": ("reward_mean", _same),
    "objective/rlhf_reward": ("score_mean", _same),
    "policy/approxkl_avg": ("approx_kl", _same),
    "policy/clipfrac_avg": ("clip_frac", _same),
    "policy/entropy_avg": ("entropy", _same),
    "loss/policy_avg": ("policy_loss", _same),
    "loss/value_avg": ("value_loss", _same),
    "kl": ("kl_k3", _same),
    "reward": ("reward_mean", _same),
    "reward_std": ("reward_var", _square),
    "frac_reward_zero_std": ("reward_zero_std_frac", _same),
    "completions/mean_length": ("response_length_mean", _same),
    "completions/clipped_ratio": ("eos_rate", _rest),
    "clip_ratio/region_mean": ("clip_frac", _same),
    "sampling/sampling_logp_difference/mean": ("rollout_logprob_diff_mean", _same),
    "learning_rate": ("lr", _same),
    "step_time": ("step_time_s", _same),
}
"""Names of TRL's PPOTrainer and GRPOTrainer, and what makes them ours."""

OPENRLHF: Names = {
    "kl": ("kl_per_token", _same),
    "reward": ("reward_mean", _same),
    "group_reward_std": ("reward_var", _square),
    "return": ("return_mean", _same),
    "values": ("value_mean", _same),
    "critic_loss": ("value_loss", _same),
    "response_length": ("response_length_mean", _same),
    "truncated": ("eos_rate", _rest),
    "response_clip_ratio": ("eos_rate", _rest),
    "ppo_clip_ratio": ("clip_frac", _same),
    "ppo_kl": ("approx_kl", _same),
    "entropy_loss": ("entropy", _same),
    "actor_grad_norm": ("grad_norm", _same),
    "actor_lr": ("lr", _same),
    "timing/step_total": ("step_time_s", _same),
}

VERL: Names = {
    "actor/pg_loss": ("policy_loss", _same),
    "actor/entropy": ("entropy", _same),
    "actor/entropy_loss": ("entropy", _same),
    "actor/kl_loss": ("kl_k3", _same),
    "actor/reward_kl_penalty": ("kl_per_token", _same),
    "actor/reward_kl_penalty_coeff": ("kl_coef", _same),
    "actor/pg_clipfrac": ("clip_frac", _same),
    "actor/ppo_kl": ("approx_kl", _same),
    "actor/grad_norm": ("grad_norm", _same),
    "actor/lr": ("lr", _same),
    "critic/score/mean": ("reward_mean", _same),
    "critic/rewards/mean": ("score_mean", _same),
    "critic/vf_loss": ("value_loss", _same),
    "critic/vf_explained_var": ("explained_variance", _same),
    "critic/values/mean": ("value_mean", _same),
    "critic/returns/mean": ("return_mean", _same),
    "response_length/mean": ("response_length_mean", _same),
    "response_length/clip_ratio": ("eos_rate", _rest),
    "perf/throughput": ("tokens_per_second", _same),
    "perf/time_per_step": ("step_time_s", _same),
    "timing_s/step": ("step_time_s", _same),
}

STEP_NAMES = ("step", "global_step", "training/global_step", "_step")


def _renamed(row: Mapping[str, Any], names: Names) -> Row:
    """Return the numbers of a row under this project's names; text, lists and the like are left out."""
    numbers = {
        name.removeprefix("train/"): float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    steps = [numbers[name] for name in STEP_NAMES if name in numbers]
    renamed = {name: value for name, value in numbers.items() if name not in names and name not in STEP_NAMES}
    for name, (ours, convert) in names.items():
        if name in numbers:
            renamed.setdefault(ours, convert(numbers[name]))
    return renamed | ({"step": steps[0]} if steps and np.isfinite(steps[0]) else {})


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Join neighbouring rows of one step that tell of different things: training, evaluation, the end's summary.

    What they both have, such as the epoch, is the same in them; a step that was done again has other values, or
    nothing new.
    """
    merged: list[Row] = []
    for row in rows:
        if merged and _goes_on(merged[-1], row):
            merged[-1] |= row
        else:
            merged.append(row)
    return merged


def _goes_on(before: Row, row: Row) -> bool:
    """Whether a row adds to the one before."""
    both = before.keys() & row.keys()
    return before["step"] == row["step"] and row.keys() != both and all(before[name] == row[name] for name in both)


def _trl_rows(path: Path) -> list[Row]:
    file = _trl_file(path)
    try:
        tree = json.loads(file.read_bytes())
        history = tree["log_history"] if isinstance(tree, dict) else tree
    except (ValueError, RecursionError, KeyError) as error:
        raise ValueError(f"{file} is no trainer_state.json: {error!r}; it must be JSON with a log_history") from None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{file}: log_history must be a list of objects")
    rows = []
    for row in history:
        renamed = _renamed(row, TRL)
        kl, penalty = row.get("objective/kl"), row.get("objective/non_score_reward")
        if isinstance(kl, float) and isinstance(penalty, float) and abs(kl) > 1e-3:
            renamed["kl_coef"] = -penalty / kl  # as the trainer makes the penalty: the mean of −β Σ_t log-ratio
        rows.append(renamed)
    return _checked(rows, file, "rows with a step")


def _trl_file(path: Path) -> Path:
    if path.is_file():
        return path
    states = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda one: (len(one.parent.name), str(one)))
    for file in (path / "trainer_state.json", *reversed(states)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no trainer_state.json in {str(path)!r} nor in a checkpoint-N of it; give the folder that TRL saved to, "
        "or the file"
    )


def _verl_rows(path: Path) -> list[Row]:
    file = _log_file(path)
    rows = []
    for number, line in _lines(file):
        if line.startswith("{"):
            tree = _json(line, f"{file}:{number}")
            data = tree["data"] if isinstance(tree.get("data"), dict) else tree
            rows.append(_verl_row({"step": tree.get("step"), **data}))
        elif match := re.search(r"\bstep:(\d+)((?: - [^\s:]+:\S+)+)", line):
            pairs = (pair.rpartition(":") for pair in match[2].split(" - ")[1:])
            rows.append(_verl_row({"step": int(match[1])} | {name: _number(name, text) for name, _, text in pairs}))
    return _checked(rows, file, "lines such as 'step:1 - actor/pg_loss:0.1 - …', nor JSON with a step and data")


def _verl_row(row: Mapping[str, Any]) -> Row:
    renamed = _renamed(row, VERL)
    for ours, theirs in (("reward_var", "critic/score"), ("adv_var", "critic/advantages")):
        if {f"{theirs}/max", f"{theirs}/min"} <= renamed.keys():
            # The most that a variance can be between two ends (Popoviciu), and 0 exactly where all are equal.
            renamed[ours] = ((renamed[f"{theirs}/max"] - renamed[f"{theirs}/min"]) / 2) ** 2
    if "perf/max_memory_allocated_gb" in renamed:
        renamed["peak_mem_bytes"] = renamed["perf/max_memory_allocated_gb"] * 2**30
    return renamed


def _openrlhf_rows(path: Path) -> list[Row]:
    file = _log_file(path)
    rows = []
    for number, line in _lines(file):
        if line.startswith("{"):
            rows.append(_renamed(_json(line, f"{file}:{number}"), OPENRLHF))
        elif match := re.search(r"[Gg]lobal[ _]step:? (\d+): (\{.*\})", line):
            try:
                # Python's own spelling of a dictionary, but for what is not finite; 1e999 is infinity.
                status = ast.literal_eval(re.sub(r"(?<=: )-?(?:nan|inf)\b", "1e999", match[2]))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise ValueError(f"{file}:{number}: the status is no dictionary of numbers") from None
            rows.append(_renamed({**status, "step": int(match[1])}, OPENRLHF))
    return _checked(rows, file, "lines such as 'Global step 1: {…}', nor JSON with a step or global_step")


def _log_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no log {str(path)!r}; give the trainer's log file or the folder that holds it")
    for pattern in ("*.jsonl", "*.log", "*.txt"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(one.name for one in found[:5])
            raise ValueError(f"{str(path)!r} holds several logs ({names}); give the one to read")
    raise FileNotFoundError(f"no *.jsonl, *.log or *.txt in {str(path)!r}; give the trainer's log file")


_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines without a terminal's colours; a last JSON line that is being written is left out."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            text = _TERMINAL.sub("", line).strip()
            if text and (line.endswith("\n") or not text.startswith("{")):
                yield number, text


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}; the file was damaged or changed") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: each line must be a JSON object")
    return tree


_MAY_BE_TINY = re.compile(r".*/(lr|grad_norm|ppo_kl|kl_loss|reward_kl_penalty)")


def _number(name: str, text: str) -> float | None:
    """Return the number of a console's metric; None where there is none, and where 0.000 only says that it is small."""
    if _MAY_BE_TINY.fullmatch(name) and re.fullmatch(r"-?0\.000", text):
        return None
    try:
        return float(re.sub(r"^np\.\w+\((.*)\)$", r"\1", text))
    except ValueError:
        return None


def _checked(rows: list[Row], file: Path, wanted: str) -> list[Row]:
    rows = [row for row in rows if "step" in row and len(row) > 1]
    if not rows:
        raise ValueError(f"{file} holds no {wanted}; is --format right?")
    return rows
