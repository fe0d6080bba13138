"""JSON beside the page, for scripts and monitors; every answer is strict JSON, NaN and infinity are null."""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dashboard import folder, jsonl, kinds, store
from rlhf_core import run_folder, runlog
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import synthetic_alerts

MOST_ROWS = 5000
"""Rows of one answer; ``next`` says where the following begin."""
PROFILES = {"summary.csv": "text/csv", "op_stats.csv": "text/csv", "chrome_trace.json": "application/json"}


class BadRequest(ValueError):
    """The query cannot be understood."""


def answering(handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """Make what a caller did wrong an answer in JSON."""

    def answered(request: Request) -> Response:
        try:
            return handler(request)
        except folder.NoSuchRun as error:
            return _json({"error": str(error), "runs": "/api/runs"}, 404)
        except BadRequest as error:
            return _json({"error": str(error)}, 400)

    return answered


def _json(content: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(finite(content), status, headers={"Cache-Control": "no-store"})


def finite(content: Any) -> Any:
    """Return the content with null for every number that JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {str(name): finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def _run_name(request: Request, runs: store.Store) -> str:
    names = request.query_params.getlist("run") or runs.names()[:1]
    if not names:
        raise folder.NoSuchRun(f"there is no run in {str(runs.path)!r}")
    return names[-1]


def health(request: Request) -> Response:
    """``/health``: the server answers."""
    runs = store.current()
    return _json({"status": "ok", "folder_exists": runs.path.is_dir(), "runs": len(runs.names())})


def alerts(request: Request) -> Response:
    """``/alerts?run=&test_alerts=1``: the alerts of a run, the newest by default; or an example of each rule."""
    if request.query_params.get("test_alerts") == "1":
        examples = [alert.to_json() for alert in synthetic_alerts(default_thresholds())]
        return _json({"run": None, "synthetic": True, "read": 1.0, "alerts": examples})
    runs = store.current()
    name = _run_name(request, runs)
    run = runs.run(name)
    found = [alert.to_json() for alert in run.alerts()]
    # While a long log is being read, `read` is below 1 and there may be more.
    return _json({"run": name, "synthetic": False, "read": run.progress().read, "alerts": found})


def list_runs(request: Request) -> Response:
    """``/api/runs``: the runs, the newest first, with the last step of each."""
    runs = store.current()
    return _json({"runs": [_summary(runs, name) for name in runs.names()]})


def _summary(runs: store.Store, name: str) -> dict[str, Any]:
    path = runs.path / name
    steps = kinds.planned_steps(path, folder.read_json(path, run_folder.CONFIG_FILE))
    return {"name": name, "last_step": _last_step(path), "steps": steps}


def _last_step(path: Path) -> int | None:
    """Return the last step of a log; None where there is none, or it cannot be read."""
    file = folder.open_plain(path, runlog.METRICS_FILE)
    if file is None:
        return None
    try:
        with file:
            row = jsonl.decode(jsonl.last_line(file))
    except OSError:
        return None
    return row["step"] if row else None


def metrics(request: Request) -> Response:
    """``/api/metrics?run=&from=``: rows from a step on; ``next`` is the step that the next answer begins with."""
    runs = store.current()
    name = _run_name(request, runs)
    text = request.query_params.get("from", "0")
    try:
        first = int(text)
    except ValueError:
        raise BadRequest(f"from is {text!r}; it must be a step, a whole number") from None
    path = folder.find(runs.path, name)
    rows = list(itertools.islice(timed_rows(path, first), MOST_ROWS + 1))
    following = rows.pop()["step"] if len(rows) > MOST_ROWS else None
    return _json({"run": name, "from": first, "next": following, "rows": rows})


def timed_rows(path: Path, first: int) -> Iterator[dict[str, Any]]:
    """Yield a run's metrics with the timings of the same step."""
    timings = jsonl.rows_from(path, runlog.TIMINGS_FILE, first)
    timing = next(timings, None)
    for row in jsonl.rows_from(path, runlog.METRICS_FILE, first):
        while timing is not None and timing["step"] < row["step"]:
            timing = next(timings, None)
        yield row | timing if timing is not None and timing["step"] == row["step"] else row


def metrics_csv(request: Request) -> Response:
    """``/api/metrics.csv?run=``: the whole log as a table, sent as it is read."""
    runs = store.current()
    name = _run_name(request, runs)
    run = runs.run(name)
    columns = ["step", *sorted(run.names())]

    def lines() -> Iterator[str]:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        for row in timed_rows(run.path, 0):
            numbers = jsonl.numbers(row)
            writer.writerow([_cell(numbers.get(column)) for column in columns])
            if text.tell() > 1 << 16:
                yield text.getvalue()
                text.seek(0)
                text.truncate()
        yield text.getvalue()

    return StreamingResponse(lines(), media_type="text/csv", headers=_download(f"{name}.csv"))


def _cell(number: float | None) -> str:
    if number is None:
        return ""
    return str(int(number)) if number == number and number.is_integer() and abs(number) < 2**53 else repr(number)


def profile(request: Request) -> Response:
    """``/api/profile?run=&file=``: one of the files of a profiled run."""
    runs = store.current()
    name, file_name = _run_name(request, runs), request.query_params.get("file", "")
    if file_name not in PROFILES:
        raise BadRequest(f"file is {file_name!r}; it must be one of {', '.join(PROFILES)}")
    file = folder.open_plain(folder.find(runs.path, name), "profiles", file_name)
    if file is None:
        return _json({"error": f"run {name!r} has no {file_name}; train it with --profile"}, 404)

    def blocks() -> Iterator[bytes]:
        with file:
            while block := file.read(1 << 18):
                yield block

    return StreamingResponse(blocks(), media_type=PROFILES[file_name], headers=_download(f"{name}-{file_name}"))


def _download(name: str) -> dict[str, str]:
    plain = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "_" for char in name)
    return {"Content-Disposition": f'attachment; filename="{plain}"'}


def nothing_here(request: Request) -> Response:
    """Every other path under ``/api``, which would else get the page."""
    return _json({"error": f"nothing at {request.url.path}", "known": [route.path for route in KNOWN]}, 404)


KNOWN = [
    Route("/health", answering(health)),
    Route("/alerts", answering(alerts)),
    Route("/api/runs", answering(list_runs)),
    Route("/api/metrics", answering(metrics)),
    Route("/api/metrics.csv", answering(metrics_csv)),
    Route("/api/profile", answering(profile)),
]
ROUTES = [
    *KNOWN,
    Route("/api", nothing_here, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    Route("/api/{path:path}", nothing_here, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
]
