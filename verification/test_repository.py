"""The project's own files keep their promises: pins, targets, the README's commands and tables."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from rlhf_core import cli, metrics
from rlhf_core.cli import TrainOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z0-9_-]*):", MAKEFILE, re.MULTILINE))
RLHF_COMMANDS = re.findall(r"^(rlhf .*?) *(?:#.*)?$", README, re.MULTILINE)


def requirement_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def test_the_constraints_pin_every_direct_dependency_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    names = {requirement_name(one) for one in wanted} - {project["project"]["name"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", pin) for pin in pins), pins
    assert {pin.split("==")[0] for pin in pins} == names


def test_torch_is_not_needed_to_build():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "torch" not in {requirement_name(one) for one in project["build-system"]["requires"]}


def test_the_makefile_has_the_promised_targets():
    assert {"install", "demo", "test", "test-all", "verify_m1", "bench", "lint", "clean"} <= TARGETS


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z][a-z0-9_-]*)", README))))
def test_a_make_target_of_the_readme_exists(target):
    assert target in TARGETS


@pytest.mark.parametrize("command", RLHF_COMMANDS)
def test_a_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    _, name, *arguments = shlex.split(command)
    if name == "train":
        arguments = [
            argument for argument in arguments if "/" not in argument and argument not in ("--data", "--config")
        ]
        assert isinstance(cli.parse(TrainOptions, arguments, "train", TrainOptions()), TrainOptions)
    else:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="no run"):  # understood, and then there is no such run here
            cli.run_command([name, *arguments])


def test_the_readme_has_commands_and_no_gap():
    assert len(RLHF_COMMANDS) >= 6
    assert "@@" not in README


def test_the_readme_has_the_table_of_metrics():
    assert metrics.markdown_table() in README


def test_the_readme_tree_names_every_module():
    for path in sorted((ROOT / "rlhf_core").glob("[a-z]*.py")):
        assert re.search(rf"^  {re.escape(path.name)} ", README, re.MULTILINE), path.name


def test_ci_runs_lint_and_tests():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make lint" in script
    assert "make test" in script


def test_pre_commit_runs_what_lint_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for tool in re.findall(r"^\t\$\(BIN\)/(ruff \w+|mypy)", MAKEFILE, re.MULTILINE):
        assert tool in hooks


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_no_tracked_file_names_a_folder_of_a_developers_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        found = re.search(r"(?<![\w.$\"'(])/(home|Users|root|work)/\w+", text)
        assert not found, (name, found)
