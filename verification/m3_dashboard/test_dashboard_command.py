import os
import sys
import tomllib

import pytest
from dashboard_runs import make_run
from dashboard_server import ROOT, Server, environment, free_port, started

from rlhf_core.testing.command import run_command

pytestmark = pytest.mark.m3


@pytest.fixture
def executed(monkeypatch):
    """The command line that the command becomes."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, command: calls.append((program, command)))
    return calls


def test_it_becomes_streamlit_with_this_folder_and_port(executed, tmp_path):
    run_command("dashboard", tmp_path, "--port", "9000")
    program, command = executed[0]
    assert program == sys.executable
    app = str(ROOT / "dashboard" / "app.py")
    assert command[1:] == ["-m", "streamlit", "run", app, "--server.port", "9000", "--", str(tmp_path.resolve())]


@pytest.mark.parametrize("port", ["0", "-1", "65536", "x"])
def test_a_port_that_is_none_is_refused(executed, port):
    outcome = run_command("dashboard", "--port", port)
    assert outcome.code == 2
    assert "port" in outcome.complaint.lower()
    assert executed == []


def test_a_file_in_place_of_the_folder_is_refused(executed, tmp_path):
    (tmp_path / "file").write_text("x")
    outcome = run_command("dashboard", tmp_path / "file")
    assert outcome.code == 2
    assert "give the folder where runs are kept" in outcome.complaint
    assert executed == []


def test_the_real_command_serves_the_folder_it_is_given(tmp_path):
    make_run(tmp_path, "mine", 3)
    port = free_port()
    program = "from rlhf_core.cli import main; main()"
    command = [sys.executable, "-c", program, "dashboard", str(tmp_path), "--port", str(port)]
    with started(command, Server(tmp_path, port, 0, tmp_path / "log"), environment()) as server:
        assert [one["name"] for one in server.json("/api/runs")["runs"]] == ["mine"]


def test_the_settings_bind_this_machine_alone_and_send_nothing():
    settings = tomllib.loads((ROOT / "dashboard" / ".streamlit" / "config.toml").read_text())
    assert (settings["server"]["address"], settings["server"]["port"]) == ("127.0.0.1", 8765)
    assert settings["browser"]["gatherUsageStats"] is False
