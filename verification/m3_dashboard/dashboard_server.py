"""The dashboard as a process, and how its tests ask it."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass(frozen=True)
class Server:
    """A running dashboard."""

    runs: Path
    port: int
    pid: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body; ``Host`` and ``Origin`` are sent as they are given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str, status: int = 200) -> Any:
        """Return the JSON of a path; NaN, which is none, fails."""
        found, headers, body = self.request(path)
        assert (found, headers["content-type"]) == (status, "application/json"), body[:300]

        def refuse(name: str) -> None:
            raise AssertionError(f"{path} answers {name}, which is no JSON")

        return json.loads(body, parse_constant=refuse)

    def listening(self) -> list[str]:
        """Return the addresses that something listens on at its port, as Linux writes them."""
        tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
        sockets = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()]
        return [one[1] for one in sockets if one[3] == "0A" and one[1].endswith(f":{self.port:04X}")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@contextlib.contextmanager
def started(command: Sequence[str], server: Server, variables: dict[str, str]) -> Iterator[Server]:
    """Start a server from another folder, wait until it answers, and end it after the block."""
    with server.log.open("wb") as output:
        process = subprocess.Popen(command, cwd="/", env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, server.log.read_text()
            with contextlib.suppress(OSError):
                server.request("/health")
                break
            time.sleep(0.1)
        yield replace(server, pid=process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)
