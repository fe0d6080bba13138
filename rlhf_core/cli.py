"""The command ``rlhf``. It loads torch only for what trains, and only after the environment for it is set."""

import importlib
import json
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rlhf_core.commands.options import USAGE_ERROR, UsageError, complain, describe
from rlhf_core.commands.running import early_options
from rlhf_core.config import RunConfig

COMMANDS = (
    "train",
    "sft",
    "reward",
    "dpo",
    "eval",
    "pipeline",
    "export",
    "compare",
    "samples",
    "alerts",
    "dashboard",
    "check-profile",
    "check-metrics",
    "report",
    "bench",
)
"""Each is the module of that name in ``rlhf_core.commands`` (with ``_`` for ``-``): ``Options`` and ``run``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; what a user did wrong is one line on standard error, and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = carry_out(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = complain("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read along, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (UsageError, ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        code = complain(describe(error), USAGE_ERROR)
    sys.exit(code)


def carry_out(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rlhf COMMAND [OPTIONS]\n")
        width = max(map(len, COMMANDS)) + 2
        for name in COMMANDS:
            print(f"  {name:<{width}}{command(name).Options.__doc__.strip().splitlines()[0]}")
        print("\nrlhf COMMAND --help lists the options of a command.")
        return 0 if arguments else USAGE_ERROR
    if arguments[0] not in COMMANDS:
        raise UsageError(f"unknown command {arguments[0]!r}; choose from {', '.join(COMMANDS)}")
    _drop_a_seed_that_does_not_count(arguments)
    return command(arguments[0]).run(arguments[1:])


def _drop_a_seed_that_does_not_count(arguments: list[str]) -> None:
    """Take a SEED that is none out of the environment where it does not count: a seed is given, or help asked for."""
    try:
        RunConfig()
    except ValueError:
        names = {one.partition("=")[0] for one in arguments}
        if {"-h", "--help", "--resume", "--seed"} & names or _file_gives_seed(arguments):
            del os.environ["SEED"]


def _file_gives_seed(arguments: list[str]) -> bool:
    """Return whether the file of ``--config`` has a seed."""
    file = early_options(arguments)["config"]
    try:
        text = Path(file).read_text(encoding="utf-8") if file else ""
        tree = json.loads(text) if file and file.endswith(".json") else tomllib.loads(text)
    except (OSError, ValueError, RecursionError):  # the command that reads the file says what is wrong with it
        return False
    return isinstance(tree, dict) and "seed" in tree


def command(name: str) -> ModuleType:
    """Return the module of a command."""
    return importlib.import_module(f"rlhf_core.commands.{name.replace('-', '_')}")
