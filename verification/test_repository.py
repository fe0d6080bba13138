"""What the repository says of itself is true: pins, commands, targets, licence."""

import itertools
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from rlhf_core import cli, metrics
from rlhf_core.commands.options import parse
from rlhf_core.config import TrainConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md")) if path.is_file()]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
# The extras require each other by the project's own name.
OWN = {PROJECT["project"]["name"]}


def distribution(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


def direct_dependencies() -> set[str]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values(), PROJECT["build-system"]["requires"]]
    return {distribution(requirement) for requirement in itertools.chain(*groups)} - OWN


def recipe(target: str) -> str:
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE).group(1)


def tracked_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def code_of(document: Path) -> list[str]:
    """The lines of a document's fenced blocks, and its spans of code."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", outside)


def documented_commands(program: str) -> list[tuple[str, str]]:
    found = {
        (document.name, line) for document in DOCUMENTS for line in code_of(document) if line.startswith(f"{program} ")
    }
    return sorted(found)


def test_constraints_pin_every_direct_dependency_and_nothing_else():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9A-Za-z.]*", line) for line in lines), lines
    assert {line.partition("==")[0] for line in lines} == direct_dependencies()
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])


def test_the_pins_satisfy_what_the_project_asks_for():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values(), PROJECT["build-system"]["requires"]]
    for requirement in map(Requirement, itertools.chain(*groups)):
        if requirement.name not in OWN:
            assert requirement.specifier.contains(pins[distribution(requirement.name)]), requirement


@pytest.mark.parametrize("target", ["install", "demo", "test", "test-all", "verify_m1", "bench", "lint", "clean"])
def test_make_has_the_target_and_it_runs_something(target):
    assert target in TARGETS
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert target in phony
    outcome = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip()


@pytest.mark.parametrize(("document", "command"), documented_commands("make"))
def test_a_make_command_in_the_documents_exists(document, command):
    words = [word for word in shlex.split(command, comments=True)[1:] if not word.startswith("-") and "=" not in word]
    assert words
    assert set(words) <= TARGETS, document


@pytest.mark.parametrize(("document", "command"), documented_commands("rlhf"))
def test_an_rlhf_command_in_the_documents_is_understood(document, command, monkeypatch):
    monkeypatch.delenv("SEED", raising=False)
    name, *arguments = shlex.split(command, comments=True)[1:]
    if "--help" in arguments or {"A", "B", "RUN"} & set(arguments):
        assert name in cli.COMMANDS
        return
    options = cli.command(name).Options
    default = options(train=TrainConfig()) if name == "train" else None
    assert parse(options, arguments, name, default), document


def test_the_readme_has_commands_and_no_gap():
    assert len([name for name, _ in documented_commands("make") if name == "README.md"]) >= 2
    assert len([name for name, _ in documented_commands("rlhf") if name == "README.md"]) >= 6
    assert "@@" not in README


def test_the_readme_has_the_table_of_metrics():
    assert metrics.markdown_table() in README


def test_the_readme_tree_names_every_module():
    def named(folder: Path, indent: str, text: str) -> set[str]:
        names = re.findall(rf"^{indent}([a-z]\w*\.py) ", text, re.MULTILINE)
        assert sorted(names) == sorted(path.name for path in folder.glob("[a-z]*.py")), folder.name
        return set(names)

    tree = README.partition("\nrlhf_core/ ")[2].partition("\ndashboard/ ")[0]
    assert "config.py" in named(ROOT / "rlhf_core", "  ", tree)
    for folder in sorted(
        {path.parent for path in (ROOT / "rlhf_core").glob("*/[a-z]*.py")} - {ROOT / "rlhf_core" / "testing"}
    ):
        part = tree.partition(f"\n  {folder.name}/ ")[2]
        assert named(folder, "    ", re.split(r"\n  [a-z]", part)[0])


def test_torch_is_not_needed_to_build():
    assert "torch" not in {distribution(requirement) for requirement in PROJECT["build-system"]["requires"]}


def test_continuous_integration_runs_lint_and_tests_and_fails_with_them():
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert script.stat().st_mode & 0o111
    assert lines[0] == "set -euo pipefail"
    assert lines[-3:] == ["make lint", "make test", "make cuda"]


def test_pre_commit_runs_what_make_lint_runs():
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    wanted = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe("lint").splitlines()]
    assert hooks == wanted
    assert [Path(entry.split()[0]).name for entry in hooks] == ["ruff", "ruff", "mypy"]


def test_mypy_looks_at_all_packages():
    assert PROJECT["tool"]["mypy"]["packages"] == ["dashboard", "rlhf_core", "rlhf_kernels"]


def test_warnings_are_errors():
    assert PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"


def test_every_package_folder_is_installed():
    folders = {name: ROOT / name for name in ("dashboard", "rlhf_core")}
    folders["rlhf_kernels"] = ROOT / "kernels" / "rlhf_kernels"
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for path in folder.rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for part in ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"):
        assert part in text


def test_no_tracked_file_names_a_folder_of_one_machine():
    # Put together, so that this file does not hold what it looks for.
    homes = [
        "/".join(["", *parts]) for parts in (("home", ""), ("Users", ""), ("root", ""), ("work", ""), ("tmp", "w", ""))
    ]
    pattern = re.compile("|".join(rf"(?<![\w./-]){re.escape(home)}[\w.]" for home in homes))
    offences = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8")
            offences += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert offences == []


def test_no_tracked_file_is_a_build_product_or_large():
    for path in tracked_files():
        assert path.suffix not in {".so", ".o", ".pyc", ".whl", ".safetensors"}, path
        assert path.stat().st_size < 1_000_000, path


def test_text_files_are_utf_8_with_line_feeds_and_end_with_one():
    for path in tracked_files():
        content = path.read_bytes()
        if content and b"\0" not in content:
            assert b"\r\n" not in content, path
            assert content.endswith(b"\n"), path
