"""``rlhf dashboard``."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlhf_core.commands.options import parse


@dataclass(frozen=True)
class Options:
    """Show runs in the browser, live, on http://127.0.0.1:8765, with JSON beside the page."""

    runs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")] = Path("runs")
    """The folder where runs are kept."""
    port: int = 8765
    """The port on this machine; nothing outside of it can connect."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}; it must be between 1 and 65535")


def run(arguments: list[str]) -> int:
    """Become the dashboard's server, which ends with Ctrl-C.

    Raises:
        NotADirectoryError: the runs are a file.
        FileNotFoundError: the dashboard is not installed.
    """
    options = parse(Options, arguments, "dashboard")
    if options.runs.exists() and not options.runs.is_dir():
        raise NotADirectoryError(f"{str(options.runs)!r} is a file; give the folder where runs are kept")
    os.execv(sys.executable, command(options))


def command(options: Options) -> list[str]:
    """Return the command line of the server."""
    found = importlib.util.find_spec("dashboard")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the dashboard is not installed; install the kit with: pip install -e .")
    app = Path(found.submodule_search_locations[0]) / "app.py"
    # An option outweighs STREAMLIT_SERVER_ADDRESS and the user's own settings.
    served = ["--server.address", "127.0.0.1", "--server.port", str(options.port)]
    return [sys.executable, "-m", "streamlit", "run", str(app), *served, "--", str(options.runs.resolve())]
