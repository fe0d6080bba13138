import shutil

import pytest

from rlhf_core import run_folder


@pytest.fixture
def runs(tmp_path, finished_run):
    """A folder of runs in which ``latest`` is a finished one."""
    shutil.copytree(finished_run, tmp_path / "runs" / "earlier")
    run_folder.point_latest(tmp_path / "runs" / "earlier")
    return tmp_path / "runs"
