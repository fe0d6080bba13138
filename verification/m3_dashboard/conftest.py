import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from dashboard_server import ROOT, Server, environment, free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``streamlit run dashboard/app.py`` as a user starts it, from another folder, on a free port."""
    runs, port = tmp_path_factory.mktemp("runs"), free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "dashboard" / "app.py"), "--server.port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--", str(runs)], cwd="/", env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    running = Server(runs, port, process.pid, log)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                running.request("/health")
                break
            except OSError:
                time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=20)
