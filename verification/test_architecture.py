"""The house rules: which module may import which, and what none may do."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {path.stem: path for path in sorted((ROOT / "rlhf_core").glob("*.py")) if path.stem != "__init__"}
KERNELS = sorted((ROOT / "kernels" / "rlhf_kernels").rglob("*.py"))
LIBRARY = [*CORE.values(), *sorted((ROOT / "rlhf_core" / "testing").glob("*.py")), *KERNELS]
WITHOUT_TORCH = ("config", "metrics", "numerics", "review_grammar", "reviews", "runlog", "terminal")


def imported(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def core_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("rlhf_core.")} & CORE.keys()


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def reachable(start: str) -> Iterator[str]:
    waiting, seen = [start], {start}
    while waiting:
        for name in core_imports(CORE[waiting.pop()]) - seen:
            seen.add(name)
            waiting.append(name)
            yield name


def test_the_kernels_import_nothing_of_the_other_folders():
    assert len(KERNELS) > 5
    for path in KERNELS:
        assert not top_levels(path) & {"rlhf_core", "verification", "dashboard"}, path


def test_nothing_imports_verification_or_dashboard():
    for path in LIBRARY:
        assert not top_levels(path) & {"verification", "dashboard"}, path


def test_what_shows_a_run_never_loads_torch():
    names = [*WITHOUT_TORCH, *(["alerts"] if "alerts" in CORE else [])]
    lines = "\n".join(f"import rlhf_core.{name}" for name in (*names, "cli"))
    code = f"{lines}\nimport sys\nassert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", ["losses", "advantages"])
def test_the_maths_is_pure_torch(module):
    assert top_levels(CORE[module]) <= {"torch", "math", "typing"}


def test_only_the_command_line_imports_the_pipeline():
    importers = {name for name, path in CORE.items() if "pipeline" in core_imports(path)}
    assert importers == {"cli"}


@pytest.mark.parametrize("module", sorted(CORE))
def test_imports_run_one_way(module):
    assert module not in set(reachable(module)), f"{module} imports itself through others"


def test_package_files_are_empty_but_the_kernels_public_api():
    for path in (ROOT / "rlhf_core").rglob("__init__.py"):
        assert path.read_text(encoding="utf-8") == "", path
    assert "__all__" in (ROOT / "kernels" / "rlhf_kernels" / "__init__.py").read_text(encoding="utf-8")


def test_the_kernels_folder_is_no_package_so_that_it_cannot_hide_the_one_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_unpickles():
    for path in LIBRARY:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bimport pickle|torch\.load\(|allow_pickle|use_safetensors=False", text), path


def test_only_the_profiler_reads_a_clock():
    for path in LIBRARY:
        clocks = top_levels(path) & {"time", "datetime", "socket", "uuid", "getpass"}
        assert not clocks or path == CORE["profiling"], (path, clocks)


CODE_THAT_LOADS_A_MODEL = """
from transformers import AutoModelForCausalLM, GPT2Config
model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
import torch
assert model(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, 16)
"""


@pytest.mark.parametrize("installed", [False, True], ids=["without", "with"])
def test_transformers_loads_a_model_from_the_root_with_and_without_a_package_named_kernels(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": ""}
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
        info = tmp_path / "kernels-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
        environment["PYTHONPATH"] = str(tmp_path)
    # With -c the working directory comes first on the path, as it does for somebody who works in the checkout.
    result = subprocess.run(
        [sys.executable, "-c", CODE_THAT_LOADS_A_MODEL],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
