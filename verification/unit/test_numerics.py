import os
import sys

import pytest

from rlhf_core import numerics


def test_threads_are_set_whatever_the_shell_says():
    for kind in ("portable", "native"):
        variables = numerics.environment(kind, 3)
        assert (variables["OMP_NUM_THREADS"], variables["MKL_NUM_THREADS"]) == ("3", "3")
        assert (variables["OMP_DYNAMIC"], variables["MKL_DYNAMIC"]) == ("FALSE", "FALSE")


def test_portable_takes_the_code_paths_that_all_processors_share():
    variables = numerics.environment("portable", 1)
    assert (variables["ATEN_CPU_CAPABILITY"], variables["MKL_CBWR"]) == ("default", "COMPATIBLE")


@pytest.mark.parametrize(
    ("flags", "path"), [({"avx2", "avx512f"}, "AVX512,STRICT"), ({"avx2"}, "AVX2,STRICT"), (set(), "AVX2,STRICT")]
)
def test_native_takes_the_widest_path_of_the_processor(monkeypatch, flags, path):
    monkeypatch.setattr(numerics, "cpu_flags", lambda: frozenset(flags))
    variables = numerics.environment("native", 2)
    assert variables["MKL_CBWR"] == path
    assert "ATEN_CPU_CAPABILITY" not in variables


@pytest.fixture
def own_environment(monkeypatch):
    """The environment of the process, given back after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


def test_native_leaves_a_narrower_path_that_the_caller_asked_for(own_environment):
    own_environment |= {"MKL_CBWR": "SSE4_2", "OMP_NUM_THREADS": "7"}
    numerics.apply_environment("native", 2)
    assert own_environment["MKL_CBWR"] == "SSE4_2"
    assert own_environment["OMP_NUM_THREADS"] == "2"


def test_portable_refuses_a_process_in_which_torch_runs_on_another_path(own_environment):
    assert "torch" in sys.modules
    own_environment |= {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "default"}
    with pytest.raises(RuntimeError, match="start the process with MKL_CBWR=COMPATIBLE$"):
        numerics.apply_environment("portable", 1)


def test_portable_overrides_the_shell_before_torch_is_loaded(own_environment, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    own_environment |= {"MKL_CBWR": "AVX512", "ATEN_CPU_CAPABILITY": "avx512"}
    numerics.apply_environment("portable", 1)
    assert (own_environment["ATEN_CPU_CAPABILITY"], own_environment["MKL_CBWR"]) == ("default", "COMPATIBLE")


def test_a_system_without_proc_cpuinfo_has_no_flags_and_still_a_name(monkeypatch):
    class Missing:
        def __init__(self, path):
            pass

        def read_text(self, encoding):
            raise FileNotFoundError

    monkeypatch.setattr(numerics, "Path", Missing)
    assert numerics.cpu_flags() == frozenset()
    assert numerics.cpu_name()


def test_flags_and_name_are_read_from_the_first_processor(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some CPU: fast\nflags\t\t: fpu avx2 fma\nflags\t\t: fpu\n")
    monkeypatch.setattr(numerics, "Path", lambda path: cpuinfo)
    assert numerics.cpu_flags() == {"fpu", "avx2", "fma"}
    assert numerics.cpu_name() == "Some CPU: fast"
