import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_server import ROOT, Server, environment, free_port, started


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``streamlit run dashboard/app.py`` as a user starts it, on a free port, once for all tests."""
    runs, log = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "dashboard" / "app.py"), "--server.port", str(port)]
    with started([*command, "--", str(runs)], Server(runs, port, 0, log), environment()) as running:
        yield running


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    folder = (tmp_path / "runs").resolve()
    folder.mkdir()
    monkeypatch.setenv("RLHF_RUNS", str(folder))
    return folder
