import asyncio
import os
import sys
import tomllib

import pytest
from dashboard_runs import make_run
from dashboard_server import ROOT, Server, environment, free_port, started

from dashboard.guard import ThisMachine
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
    served = ["--server.address", "127.0.0.1", "--server.port", "9000"]
    assert command[1:] == ["-m", "streamlit", "run", app, *served, "--", str(tmp_path.resolve())]


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


def test_an_address_in_the_environment_does_not_open_the_command_to_other_machines(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", "from rlhf_core.cli import main; main()", "dashboard", str(tmp_path)]
    variables = environment() | {"STREAMLIT_SERVER_ADDRESS": "0.0.0.0"}
    server = Server(tmp_path, port, 0, tmp_path / "log")
    with started([*command, "--port", str(port)], server, variables) as running:
        assert running.listening() == [f"0100007F:{port:04X}"]


def answer_to(client: tuple[str, int] | None, kind: str) -> list[object]:
    """What the middleware sends to a client of an application that says that it was reached."""
    sent: list[object] = []

    async def application(scope, receive, send):
        await send({"type": "reached"})

    async def send(message):
        sent.append(message.get("status", message.get("code", message["type"])))

    asyncio.run(ThisMachine(application)({"type": kind, "client": client}, None, send))
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_clients_of_other_machines_are_refused_whatever_the_server_listens_on(kind):
    refused = {"http": 403, "websocket": 1008}[kind]
    for address in (
        "192.168.1.7",
        "10.0.0.1",
        "8.8.8.8",
        "::ffff:10.0.0.1",
        "fe80::1",
        "2001:db8::1",
        "",
        "testclient",
    ):
        assert answer_to((address, 5), kind)[0] == refused, address
    assert answer_to(None, kind)[0] == refused
    for address in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"):
        assert answer_to((address, 5), kind) == ["reached"], address


def test_the_settings_bind_this_machine_alone_and_send_nothing():
    settings = tomllib.loads((ROOT / "dashboard" / ".streamlit" / "config.toml").read_text())
    assert (settings["server"]["address"], settings["server"]["port"]) == ("127.0.0.1", 8765)
    assert settings["browser"]["gatherUsageStats"] is False
