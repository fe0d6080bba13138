"""The SHA-256 of the logs, recorded: see conftest.py on how."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import m1_runs
import pytest
import torch
import transformers
from m1_runs import (
    BASE,
    EMULATED,
    GPT2,
    NARROWER,
    NARROWER_GPT2,
    NATIVE,
    NATIVE_GPT2,
    NATIVE_NARROWER,
    Run,
    RunPool,
    assert_identical,
)
from syrupy.assertion import SnapshotAssertion
from syrupy.data import SnapshotCollections
from syrupy.extensions.json import JSONSnapshotExtension

from rlhf_core.numerics import cpu_name
from rlhf_core.testing.assertions import run_hashes
from rlhf_kernels.products import available

pytestmark = pytest.mark.m1

RECORD = "pytest verification/m1_determinism -k golden_hash_of --snapshot-update"
LIBM_FUNCTIONS = "expf", "logf", "sinf"
fused = pytest.mark.skipif(
    not available(), reason="this processor has no fused multiply-add, so it has other native bits"
)


class GoldenHashes(JSONSnapshotExtension):
    """A file for each thing that a hash belongs to.

    Most are of other machines: they are not unused, so syrupy shall neither complain of them nor remove them.
    """

    snapshot_dirname = "golden_hashes"

    @classmethod
    def dirname(cls, *, test_location: Any) -> str:
        return str(Path(test_location.filepath).parent / cls.snapshot_dirname)

    @classmethod
    def get_file_basename(cls, *, test_location: Any, index: Any) -> str:
        return str(index)

    @classmethod
    def matches_test_location(cls, *, test_location: Any, snapshot_location: str) -> bool:
        return True

    def discover_snapshots(self, *, test_location: Any, ignore_extensions: list[str] | None = None) -> Any:
        return SnapshotCollections()


def assert_golden(run: Path, name: str, snapshot: SnapshotAssertion) -> None:
    """Compare a run's hashes with the recorded ones; skip where there are none."""
    recorded = Path(__file__).parent / GoldenHashes.snapshot_dirname / f"{name}.json"
    if not recorded.exists() and not snapshot.update_snapshots:
        pytest.skip(f"no golden hash {name} is recorded; record it with: {RECORD}")
    hashes = run_hashes(run)
    if snapshot.use_extension(GoldenHashes)(name=name) == hashes:
        return
    first_rows = "\n".join((run / log).read_text(encoding="utf-8").splitlines()[0] for log in hashes)
    versions = f"{' '.join(platform.libc_ver())}, torch {torch.__version__}, transformers {transformers.__version__}"
    pytest.fail(
        f"the logs are not those of the golden hash {name}.\nrecorded: {recorded.read_text(encoding='utf-8')}"
        f"here:     {json.dumps(hashes)}\nwith {versions}, {cpu_name()}\nfirst rows here:\n{first_rows}\n"
        f"If a change was meant to change numbers, record them anew: {RECORD}"
    )


@pytest.mark.parametrize("run", [BASE, GPT2], ids=str)
def test_golden_hash_of_portable_numerics(runs: RunPool, run: Run, snapshot: SnapshotAssertion) -> None:
    version = torch.__version__.partition("+")[0]
    assert_golden(runs[run], f"portable-{run}-torch-{version}", snapshot)


@fused
@pytest.mark.parametrize("run", [NATIVE[1], NATIVE_GPT2], ids=str)
def test_golden_hash_of_native_numerics(runs: RunPool, run: Run, snapshot: SnapshotAssertion) -> None:
    version = torch.__version__.partition("+")[0]
    assert_golden(runs[run], f"{run}-torch-{version}", snapshot)


@fused
@pytest.mark.parametrize(("wide", "narrower"), NATIVE_NARROWER, ids=str)
def test_native_bytes_survive_narrower_instruction_sets(runs: RunPool, wide: Run, narrower: Run) -> None:
    assert_identical(runs[wide], runs[narrower])


@pytest.mark.parametrize("base", [BASE], ids=str)
@pytest.mark.parametrize("narrower", NARROWER, ids=str)
def test_portable_bytes_survive_narrower_instruction_sets(runs: RunPool, base: Run, narrower: Run) -> None:
    assert_identical(runs[base], runs[narrower])


def libm_functions(**environment: str) -> list[int]:
    """Return where in libm the variants lie that a process would call."""
    program = f"""
import ctypes, pathlib
libm = ctypes.CDLL("libm.so.6")
maps = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line]
base = min(int(line.split("-")[0], 16) for line in maps)
print([ctypes.cast(getattr(libm, name), ctypes.c_void_p).value - base for name in {LIBM_FUNCTIONS}])
"""
    command = [sys.executable, "-c", program]
    plain = m1_runs.plain_environment()
    output = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="GLIBC_TUNABLES is glibc's")
def test_the_narrower_set_really_takes_the_fused_multiply_add_from_libm() -> None:
    from rlhf_core.numerics import cpu_flags

    if "fma" not in cpu_flags():
        pytest.skip("this processor has no fused multiply-add, so there is nothing to take away")
    tunables = dict(NARROWER[0].environment)["GLIBC_TUNABLES"]
    assert all(a != b for a, b in zip(libm_functions(), libm_functions(GLIBC_TUNABLES=tunables), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "narrower"), [(GPT2, NARROWER_GPT2)], ids=str)
def test_portable_bytes_of_gpt2_survive_a_narrower_instruction_set(runs: RunPool, base: Run, narrower: Run) -> None:
    assert_identical(runs[base], runs[narrower])


@pytest.mark.slow
@pytest.mark.skipif(m1_runs.why_no_emulator() is not None, reason=str(m1_runs.why_no_emulator()))
@pytest.mark.parametrize(("base", "emulated"), EMULATED, ids=str)
def test_bytes_survive_an_emulated_other_processor(runs: RunPool, base: Run, emulated: Run) -> None:
    assert_identical(runs[base], runs[emulated])


@fused
@pytest.mark.slow
@pytest.mark.parametrize("base", [NATIVE[1]], ids=str)
@pytest.mark.parametrize(
    ("stage", "size"),
    [
        ("reward", ("--training.steps", "4")),
        ("dpo", ("--training.steps", "4")),
        ("eval", ("--judging.prompts", "8", "--sampling.max-new-tokens", "12")),
    ],
)
def test_native_bytes_of_a_stage_survive_narrower_instruction_sets(
    runs: RunPool, base: Run, stage: str, size: tuple[str, ...], tmp_path: Path
) -> None:
    words = ["a", "good", "film", "a", "poor", "plot", "the", "bright", "actor", "and", "a", "dull", "scene"]
    pairs = [
        {"prompt": " ".join(words[: 2 + k % 3]), "chosen": " ".join(words[k % 7 :]), "rejected": words[(k + 5) % 12]}
        for k in range(24)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    model = str(runs[base] / "models" / "base")
    found = []
    for name, environment in (("wide", ()), ("narrow", m1_runs.AVX2_TORCH)):
        options = ("--data", str(data), "--model.path", model, *size, "--runs", str(tmp_path))
        subprocess.run(
            (sys.executable, "-m", "rlhf_core", stage, "--name", name, "--numerics", "native", *options),
            env={**m1_runs.plain_environment(), **dict(environment)},
            check=True,
            capture_output=True,
        )
        found.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert found[0] == found[1]
