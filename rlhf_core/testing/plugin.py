"""A pytest plugin: the marker ``cuda``, and a finished run to look at.

Another project takes it with a line in its ``conftest.py``::

    pytest_plugins = ["rlhf_core.testing.plugin"]

and then writes tests such as::

    @pytest.mark.cuda  # skipped where there is no GPU
    def test_the_gpu_agrees(): ...


    def test_my_page_shows_a_run(finished_run):
        assert my_page.read(finished_run).steps == 5

``--implementation module:adapter`` holds somebody's numeric functions to this project's oracles.

The assertions that go with it are in :mod:`rlhf_core.testing.assertions`.
"""

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.testing.command import TINY_RUN, run_command
from rlhf_core.testing.implementation import KIT, Results, load_implementation, name_of, write_table

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the numeric tests."""
    group = parser.getgroup("rlhf")
    group.addoption(
        "--implementation",
        default=None,
        metavar="MODULE:ADAPTER",
        help="whose numeric functions are tested, and nothing else: see rlhf_core.testing.implementation",
    )
    group.addoption(
        "--write-table",
        metavar="PATH",
        help="write what the numeric tests found into the table of this document, as the implementation's column",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known.

    Raises:
        pytest.UsageError: a table is to be written by several processes, each of which knows its own tests alone.
    """
    several = config.getoption("numprocesses", None) or config.getoption("dist", "no") != "no"
    if config.getoption("--write-table") and several:
        raise pytest.UsageError("--write-table needs all tests in one process: leave out -n, --numprocesses and --dist")
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU; skipped without one")
    config.stash[RESULTS] = Results(column="")
    if config.getoption("--implementation"):
        config.addinivalue_line("filterwarnings", "default")  # somebody else's warnings are no wrong numbers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not look at the implementation that was named."""
    if config.getoption("--implementation") is None:
        return
    other = [item for item in items if "implementation" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in other]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU here")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, where one was asked for and a numeric test has run."""
    path, results = session.config.getoption("--write-table"), session.config.stash[RESULTS]
    if path and results.cells:
        write_table(Path(path), results)


@pytest.fixture(scope="session")
def implementation(pytestconfig: pytest.Config) -> Any:
    """Return the adapter that ``--implementation`` names."""
    spec = pytestconfig.getoption("--implementation") or KIT
    try:
        found = load_implementation(spec)
    except ValueError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    pytestconfig.stash[RESULTS].column = name_of(found, spec)
    return found


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with the options :data:`~rlhf_core.testing.command.TINY_RUN`.

    It belongs to all tests of the session: copy it before changing it.
    """
    runs = tmp_path_factory.mktemp("finished")
    outcome = run_command("train", *TINY_RUN, "--runs", runs, "--name", "tiny")
    assert outcome.code == 0, outcome.err
    return runs / "tiny"
