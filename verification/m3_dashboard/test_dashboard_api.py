import json
import os
from pathlib import Path

import pytest
from dashboard_runs import append, make_run, make_stage_run, metrics_row, timing_row

pytestmark = pytest.mark.m3


@pytest.fixture(scope="module", autouse=True)
def run(server):
    """Twelve of twenty steps, of which the seventh has a NaN."""
    folder = make_run(server.runs, "api", 6, planned=20)
    append(folder / "metrics.jsonl", metrics_row(7, kl=None), *(metrics_row(step) for step in range(8, 13)))
    return folder


def test_health_says_that_the_server_answers(server):
    answer = server.json("/health")
    assert answer["status"] == "ok"
    assert answer["folder_exists"] is True
    assert answer["runs"] >= 1


def test_runs_are_listed_with_their_last_step(server):
    runs = {one["name"]: one for one in server.json("/api/runs")["runs"]}
    assert runs["api"] == {"name": "api", "last_step": 12, "steps": 20}


def test_one_bad_run_does_not_take_down_the_list(server):
    make_run(server.runs, os.fsdecode(b"bad\xff"), 2)
    deep = make_run(server.runs, "deep", 2)
    (deep / "config.json").write_text("[" * 100_000)
    (deep / "metrics.jsonl").write_bytes(b"\xff\n")
    runs = {one["name"]: one for one in server.json("/api/runs")["runs"]}
    assert runs["api"]["last_step"] == 12
    assert runs["deep"] == {"name": "deep", "last_step": None, "steps": None}
    assert not [name for name in runs if name.startswith("bad")]


def test_the_stages_of_a_pipeline_are_asked_for_by_both_names(server):
    pipeline = server.runs / "staged"
    pipeline.mkdir()
    (pipeline / "config.json").write_text('{"reward_model": {}, "ppo": {"steps": 2}}')
    make_stage_run(pipeline, "sft", 3)
    runs = {one["name"]: one for one in server.json("/api/runs")["runs"]}
    assert runs["staged/sft"] == {"name": "staged/sft", "last_step": 3, "steps": 6}
    assert "staged" not in runs
    assert len(server.json("/api/metrics?run=staged/sft")["rows"]) == 3
    assert server.request("/api/metrics.csv?run=staged/sft")[1]["content-disposition"].endswith('"staged_sft.csv"')


def test_metrics_begin_at_the_step_asked_for_and_go_with_their_timings(server):
    answer = server.json("/api/metrics?run=api&from=5")
    assert [row["step"] for row in answer["rows"]] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert (answer["run"], answer["from"], answer["next"]) == ("api", 5, None)
    assert answer["rows"][0]["kl"] == metrics_row(5)["kl"]
    assert answer["rows"][0]["tokens_per_second"] == 800
    assert "tokens_per_second" not in answer["rows"][3]


def test_what_was_not_finite_is_null_and_never_breaks_the_json(server):
    row = server.json("/api/metrics?run=api&from=7")["rows"][0]
    assert row["kl"] is None
    assert row["nonfinite"] == ["kl"]
    found = {alert["name"]: alert for alert in server.json("/alerts?run=api")["alerts"]}
    assert (found["nonfinite"]["severity"], found["nonfinite"]["first_step"]) == ("critical", 7)
    assert (found["nonfinite"]["value"], found["nonfinite"]["threshold"]) == (None, None)


def test_a_log_that_spells_nan_and_infinity_is_answered_in_strict_json(server):
    folder = make_run(server.runs, "spelled", 3, planned=9)
    row = json.dumps(metrics_row(4) | {"kl": float("nan"), "entropy": float("inf"), "grad_norm": 10**400})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    append(folder / "timings.jsonl", timing_row(4))
    answered = server.json("/api/metrics?run=spelled&from=4")["rows"][0]
    assert (answered["kl"], answered["entropy"]) == (None, None)
    assert "nonfinite" in {alert["name"] for alert in server.json("/alerts?run=spelled")["alerts"]}


def test_a_long_answer_says_where_the_next_one_begins(server):
    from dashboard import api

    steps = api.MOST_ROWS + 3
    folder = server.runs / "paged"
    folder.mkdir()
    append(folder / "metrics.jsonl", *({"step": step, "kl": 1.0} for step in range(1, steps + 1)))
    first = server.json("/api/metrics?run=paged")
    assert (len(first["rows"]), first["next"]) == (api.MOST_ROWS, api.MOST_ROWS + 1)
    second = server.json(f"/api/metrics?run=paged&from={first['next']}")
    assert [row["step"] for row in second["rows"]] == [steps - 2, steps - 1, steps]
    assert second["next"] is None


def test_an_example_of_each_rule_is_marked_synthetic(server):
    from rlhf_core.alerting.rules import RULES, STALLED

    answer = server.json("/alerts?run=api&test_alerts=1")
    assert answer["synthetic"] is True
    assert all(alert["synthetic"] for alert in answer["alerts"])
    assert {alert["name"] for alert in answer["alerts"]} == {rule.name for rule in (*RULES, STALLED)}
    assert not any(alert["synthetic"] for alert in server.json("/alerts?run=api")["alerts"])


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/nothing", "/api/runs/api"])
def test_unknown_paths_are_404_in_json(server, path):
    assert "error" in server.json(path, status=404)


@pytest.mark.parametrize("path", ["/api/../etc/passwd", "/api/%2e%2e/etc/passwd", "//etc/passwd", "/api/..%2f..%2fetc"])
def test_paths_that_climb_are_refused(server, path):
    status, _, body = server.request(path)
    assert status in (400, 404)
    assert b"root:" not in body


def test_other_methods_change_nothing_and_get_json(server):
    for method in ("POST", "PUT", "DELETE"):
        status, headers, body = server.request("/api/nothing", method, Content_Length="0")
        assert (status, headers["content-type"]) == (404, "application/json"), body


@pytest.mark.parametrize("name", ["../../etc", "..", ".", "/etc", "api/..", "api%00", "", "nothing"])
@pytest.mark.parametrize("path", ["/api/metrics", "/alerts", "/api/metrics.csv", "/api/profile"])
def test_only_names_of_the_listing_are_runs(server, path, name):
    extra = "&file=summary.csv" if path == "/api/profile" else ""
    status, _, body = server.request(f"{path}?run={name}{extra}")
    assert status == 404
    assert b"root:" not in body
    assert "error" in json.loads(body)


@pytest.mark.parametrize("query", ["from=x", "from=1.5", "from=", "from=1e3", "from=" + "9" * 5000])
def test_a_step_that_is_none_is_a_bad_request(server, query):
    assert "whole number" in server.json(f"/api/metrics?run=api&{query}", status=400)["error"]


def test_links_lead_nowhere(server, tmp_path):
    """A linked run is not listed; a linked log, profile or folder of profiles is not there."""
    secret = tmp_path / "secret"
    make_run(tmp_path, "secret_run", 3)
    secret.write_text('{"step": 1, "secret": 42}\n')
    (server.runs / "linked_run").symlink_to(tmp_path / "secret_run")
    run = make_run(server.runs, "links", 2)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(secret)
    (run / "profiles").symlink_to(tmp_path)
    (tmp_path / "summary.csv").write_text("secret")
    assert "linked_run" not in [one["name"] for one in server.json("/api/runs")["runs"]]
    assert "error" in server.json("/api/metrics?run=linked_run", status=404)
    assert server.json("/api/metrics?run=links")["rows"] == []
    assert "no summary.csv" in server.json("/api/profile?run=links&file=summary.csv", status=404)["error"]
    assert b"secret" not in server.request("/api/metrics.csv?run=links")[2]


def test_a_pipe_in_a_runs_place_does_not_hold_the_server(server):
    run = make_run(server.runs, "pipe", 2)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert server.json("/api/metrics?run=pipe")["rows"] == []


def test_the_log_comes_as_csv(server):
    status, headers, body = server.request("/api/metrics.csv?run=api")
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="api.csv"'
    header, *rows = body.decode().splitlines()
    names = header.split(",")
    assert names[0] == "step"
    assert {"kl", "tokens_per_second", "stages_s/update/optimizer"} <= set(names)
    cells = [row.split(",") for row in rows]
    assert [row[0] for row in cells] == [str(step) for step in range(1, 13)]
    assert float(cells[4][names.index("kl")]) == metrics_row(5)["kl"]
    assert cells[6][names.index("kl")] == "nan"
    assert cells[8][names.index("tokens_per_second")] == ""


def test_profiles_come_whole_and_nothing_else_does(server):
    run = make_run(server.runs, "profiled", 2)
    (run / "profiles").mkdir()
    trace = json.dumps({"traceEvents": [{"name": "x" * 100_000}] * 10})
    (run / "profiles" / "chrome_trace.json").write_text(trace)
    status, headers, body = server.request("/api/profile?run=profiled&file=chrome_trace.json")
    assert (status, body.decode()) == (200, trace)
    assert headers["content-disposition"] == 'attachment; filename="profiled-chrome_trace.json"'
    for name in ("config.json", "../config.json", "", "chrome_trace.json/../../config.json"):
        assert "must be one of" in server.json(f"/api/profile?run=profiled&file={name}", status=400)["error"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "0.0.0.0", "169.254.1.1"]
)
def test_other_names_of_this_host_are_refused(server, host):
    for path in ("/", "/health", "/api/metrics?run=api", "/_stcore/health"):
        assert server.request(path, Host=host)[0] == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machines_names_are_answered(server, host):
    assert server.request("/health", Host=f"{host}:{server.port}")[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://127.0.0.1", "http://127.0.0.1:1", "null", "file://"]
)
def test_pages_of_another_origin_are_refused(server, origin):
    for path in ("/", "/health", "/api/runs"):
        status, headers, _ = server.request(path, Origin=origin)
        assert status == 403
        assert "access-control-allow-origin" not in headers
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
    upgrade["Sec_WebSocket_Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    assert server.request("/_stcore/stream", Origin=origin, **upgrade)[0] == 403


def test_its_own_page_is_answered_and_may_load_nothing_from_elsewhere(server):
    status, headers, _ = server.request("/", Origin=server.url)
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http:" not in policy
    assert "*" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_it_listens_on_this_machine_alone(server):
    assert server.listening() == [f"0100007F:{server.port:04X}"]


def test_the_server_has_not_loaded_torch(server):
    server.json("/alerts?run=api")
    libraries = Path(f"/proc/{server.pid}/maps").read_text()
    assert "libarrow" in libraries, "the libraries are listed"
    assert "libtorch" not in libraries


def test_a_folder_of_two_hundred_runs_is_listed_quickly(server):
    for number in range(200):
        make_run(server.runs, f"many{number:03}", 1)
    names = [one["name"] for one in server.json("/api/runs")["runs"]]
    assert len([name for name in names if name.startswith("many")]) == 200
