"""The import rules of the design, read from the source by ``ast``; each check is shown to find a planted offence."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    "rlhf_core": ROOT / "rlhf_core",
    "rlhf_kernels": ROOT / "kernels" / "rlhf_kernels",
    "dashboard": ROOT / "dashboard",
}
TORCH_FREE = (
    "algorithms",
    "config",
    "config_checks",
    "config_files",
    "metrics",
    "runlog",
    "run_folder",
    "durable_files",
    "alerts",
    "terminal",
    "numerics",
    "stage_config",
    "memory_plan",
    "memory_advice",
    "alerting.alert",
    "alerting.tracks",
    "alerting.thresholds",
    "alerting.literals",
    "alerting.readers",
    "alerting.translate",
    "alerting.trl_states",
    "alerting.watch",
    "data.reviews",
    "data.review_grammar",
    "data.review_parser",
)
CLOCKS_AND_HOSTS = {"time", "datetime", "socket", "uuid", "getpass", "secrets"}

Modules = dict[str, Path]


def modules(parts: dict[str, Path] = PARTS) -> Modules:
    """The project's modules by their full names."""
    found = {}
    for package, folder in parts.items():
        for path in sorted(folder.rglob("*.py")):
            names = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports(path: Path, name: str) -> set[str]:
    """Every module that a module imports, inside functions too; ``from a import b`` counts as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
            above = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def who_imports(target: str, among: Modules) -> set[str]:
    """The modules that import ``target`` or something inside it."""
    return {
        name
        for name, path in among.items()
        if any(one == target or one.startswith(f"{target}.") for one in imports(path, name))
    }


def _edges(name: str, path: Path, among: Modules) -> set[str]:
    found = imports(path, name) & among.keys()
    # `from package import sibling` inside the package is an import of the sibling alone.
    return {
        one for one in found if not (name.startswith(f"{one}.") and any(other.startswith(f"{one}.") for other in found))
    }


def cycle(among: Modules) -> list[str]:
    """A circle of imports, or nothing."""
    graph = {name: sorted(_edges(name, path, among)) for name, path in among.items()}
    state: dict[str, str] = {}

    def visit(name: str, trail: list[str]) -> list[str]:
        if state.get(name) == "open":
            return [*trail[trail.index(name) :], name]
        if state.get(name) == "done":
            return []
        state[name] = "open"
        for other in graph[name]:
            if found := visit(other, [*trail, name]):
                return found
        state[name] = "done"
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def unpickling(path: Path) -> list[str]:
    """The calls and imports of a file that would run code hidden in the data that they read."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                name
                for name in names
                if top(name) in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            ]
        elif isinstance(node, ast.Call):
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            spelled = {name: ast.unparse(value) for name, value in options.items()}
            unsafe_load = ast.unparse(node.func) == "torch.load" and spelled.get("weights_only") != "True"
            runs_code = spelled.get("trust_remote_code", "False") != "False"
            unsafe_model = runs_code or spelled.get("use_safetensors", "True") != "True"
            if unsafe_load or spelled.get("allow_pickle", "False") != "False" or unsafe_model:
                found.append(ast.unparse(node))
    return found


PROJECT = modules()
CORE = {name: path for name, path in PROJECT.items() if top(name) == "rlhf_core"}
KERNELS = {name: path for name, path in PROJECT.items() if top(name) == "rlhf_kernels"}


@pytest.fixture
def planted(tmp_path):
    """Write modules of a package ``p`` and return them."""

    def write(**sources: str) -> Modules:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return modules({"p": tmp_path})

    return write


class TestTheChecksThemselves:
    def test_imports_are_found_in_every_spelling(self, planted):
        source = """
            import a.b as c
            from d.e import f
            from . import g
            from .h import i
            def inside():
                import j
        """
        path = planted(m=source)["p.m"]
        assert imports(path, "p.m") == {"a.b", "d.e", "d.e.f", "p", "p.g", "p.h", "p.h.i", "j"}

    def test_a_cycle_is_found(self, planted):
        assert cycle(planted(a="from p import b", b="import p.c", c="def f():\n    from p.a import x")) == [
            "p.a",
            "p.b",
            "p.c",
            "p.a",
        ]

    def test_a_ladder_is_no_cycle(self, planted):
        assert cycle(planted(a="from p import b, c", b="import p.c", c="x = 1")) == []

    def test_an_importer_is_found(self, planted):
        tree = planted(a="from dashboard.page import x", b="import dashboards")
        assert who_imports("dashboard", tree) == {"p.a"}

    @pytest.mark.parametrize(
        "source",
        [
            "import pickle",
            "from pickle import loads",
            "import torch\ntorch.load('f')",
            "import torch\ntorch.load('f', weights_only=False)",
            "import torch\ntorch.load('f', weights_only=flag)",
            "import numpy as np\nnp.load('f', allow_pickle=True)",
            "AutoModel.from_pretrained('m', trust_remote_code=True)",
            "AutoModel.from_pretrained('m', trust_remote_code=flag)",
            "AutoModel.from_pretrained('m', trust_remote_code=None)",
            "AutoModel.from_pretrained('m', use_safetensors=False)",
        ],
    )
    def test_unpickling_is_found(self, planted, source):
        assert unpickling(planted(m=source)["p.m"])

    def test_safe_loading_is_not_accused(self, planted):
        source = "import torch\ntorch.load('f', weights_only=True)\nnp.load('f', allow_pickle=False)\njson.load(f)"
        assert unpickling(planted(m=source)["p.m"]) == []
        assert unpickling(planted(m="AutoModel.from_pretrained('m', trust_remote_code=False)")["p.m"]) == []


def test_the_source_is_found():
    assert {"rlhf_core.ppo", "rlhf_core.testing.plugin", "rlhf_kernels", "rlhf_kernels.cpu.launch"} <= PROJECT.keys()


def test_rlhf_kernels_imports_nothing_of_the_other_folders():
    for folder in ("rlhf_core", "verification", "dashboard"):
        assert who_imports(folder, KERNELS) == set()


def test_nothing_imports_verification_or_dashboard():
    inside = {name: path for name, path in PROJECT.items() if top(name) != "dashboard"}
    assert who_imports("verification", PROJECT) == set()
    assert who_imports("dashboard", inside) == set()


def test_only_the_command_line_imports_the_whole_training():
    assert who_imports("rlhf_core.training", PROJECT) == {"rlhf_core.commands.train", "rlhf_core.pipeline"}


def test_only_tests_import_the_tools_for_tests():
    inside = {name: path for name, path in PROJECT.items() if not name.startswith("rlhf_core.testing")}
    assert who_imports("rlhf_core.testing", inside) == set()
    assert {name for tool in ("pytest", "hypothesis", "syrupy") for name in who_imports(tool, inside)} == set()


@pytest.mark.parametrize("name", ["losses", "advantages"])
def test_losses_and_advantages_are_pure(name):
    found = {top(one) for one in imports(CORE[f"rlhf_core.{name}"], f"rlhf_core.{name}")}
    assert found <= {"torch", "math", "typing"}


def test_there_is_no_circle_of_imports():
    assert cycle(PROJECT) == []


def test_init_files_are_empty_but_for_the_public_api_of_rlhf_kernels():
    for path in PROJECT.values():
        if path.name == "__init__.py" and path != PARTS["rlhf_kernels"] / "__init__.py":
            assert path.read_text().strip() == "", path


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_unpickles_or_runs_code_that_comes_with_a_model():
    offences = {name: found for name, path in PROJECT.items() if (found := unpickling(path))}
    assert offences == {}


def test_no_clock_or_host_name_comes_near_a_log_that_must_be_reproducible():
    offences = {
        name: found
        for name, path in CORE.items()
        if (found := {top(one) for one in imports(path, name)} & CLOCKS_AND_HOSTS)
    }
    assert offences == {"rlhf_core.profiling": {"time"}, "rlhf_core.file_age": {"time"}}


def test_what_the_page_and_the_command_line_start_with_never_imports_torch_even_through_others():
    wanted = [f"rlhf_core.{name}" for name in TORCH_FREE if f"rlhf_core.{name}" in CORE]
    assert len(wanted) == len(TORCH_FREE)
    wanted += ["rlhf_core.cli", "rlhf_core.testing.assertions", "rlhf_core.testing.command"]
    program = f"import sys, {', '.join(wanted)}\nprint(sorted({{'torch', 'transformers', 'scipy'}} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (outcome.stdout.strip(), outcome.stderr) == ("[]", "")


FAKE_KERNELS = '''
class Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls()


class Anything(metaclass=Kind):
    """Stands for every class and decorator of the package."""

    def __init__(self, *arguments, **options):
        pass

    def __call__(self, decorated=None, *arguments, **options):
        return decorated

    def __or__(self, other):
        return self


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
'''

LOADS_A_MODEL = """
import sys
from pathlib import Path
from transformers.utils.import_utils import is_kernels_available
from rlhf_core.config import ModelConfig
from rlhf_core.data.tokenization import load_tokenizer, word_tokenizer
from rlhf_core.policy import build_model, load_model
from rlhf_core.rollout import left_pad
import rlhf_kernels

folder = Path(sys.argv[1])
tokenizer = word_tokenizer(["good", "film"])
tokenizer.save_pretrained(folder)
build_model(ModelConfig(layers=1, hidden_size=8, heads=2, context=8), tokenizer).save_pretrained(folder)
ids, mask = left_pad(load_tokenizer(folder)(["good film", "film"])["input_ids"], 0)
logits = load_model(folder, "eager")(input_ids=ids, attention_mask=mask).logits
print(is_kernels_available(), tuple(logits.shape))
"""


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_loads_a_model_from_the_repository_root_with_and_without_the_package_named_kernels(
    tmp_path, installed
):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path / "site"
    if installed:
        (site / "kernels").mkdir(parents=True)
        (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
        metadata = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    # As `python -m` and `streamlit run` do it: the working directory first, installed packages behind.
    program = f"import sys\nsys.path[0] = ''\nsys.path.append({str(site)!r})\n{LOADS_A_MODEL}"
    outcome = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip() == f"{installed} (2, 2, 5)"
