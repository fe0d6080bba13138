"""Which code runs for a tensor on a GPU, with the extension and without it. No GPU is needed: the tensors are fake."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rlhf_kernels import (
    BackendUnavailableError,
    KernelFallbackWarning,
    available_backends,
    dispatch,
    native,
    token_logprobs,
)
from rlhf_kernels.cuda import extension
from rlhf_kernels.dispatch import choose_backend

HALF, WIDE = (torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _no_warning_given_yet(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def on_gpu():
    with FakeTensorMode():
        yield lambda dtype=torch.float32: torch.empty(2, 4, dtype=dtype, device="cuda")


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: None)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: "it is not built; build it with `pip install`")


def test_auto_takes_the_cuda_kernels_where_they_are_loaded(loaded, on_gpu):
    assert choose_backend("auto", on_gpu(torch.bfloat16), HALF) == "cuda"
    assert choose_backend("cuda", on_gpu(), WIDE) == "cuda"
    assert "cuda" in available_backends()


def test_without_the_extension_auto_falls_back_and_says_so_once(not_built, on_gpu):
    with pytest.warns(KernelFallbackWarning, match=r"slow reference code on cuda: it is not built; .*pip install"):
        assert choose_backend("auto", on_gpu(), HALF) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", on_gpu(), HALF) == "reference"
    assert "cuda" not in available_backends()


def test_without_the_extension_the_named_backend_raises_with_the_remedy(not_built, on_gpu):
    with pytest.raises(BackendUnavailableError, match=r"'cuda' is not available \(it is not built; build it with"):
        choose_backend("cuda", on_gpu(), HALF)


def test_a_dtype_without_kernel_falls_back_and_says_so_once(loaded, on_gpu):
    with pytest.warns(KernelFallbackWarning, match=r"on cuda: the cuda kernel does not take torch\.float64"):
        assert choose_backend("auto", on_gpu(torch.float64), HALF) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", on_gpu(torch.float64), HALF) == "reference"
    with pytest.raises(TypeError, match=r"'cuda' takes torch\.float32.*got torch\.float64"):
        choose_backend("cuda", on_gpu(torch.float64), HALF)


def test_a_function_without_kernel_falls_back_and_says_so(loaded, on_gpu):
    with pytest.warns(KernelFallbackWarning, match="on cuda: this function has no kernel for cuda"):
        assert choose_backend("auto", on_gpu(), HALF, lacking=("cuda",)) == "reference"
    with pytest.raises(BackendUnavailableError, match="'cuda' has no kernel for this function; use backend='auto'"):
        choose_backend("cuda", on_gpu(), HALF, lacking=("cuda",))


def test_a_backend_is_refused_for_the_other_kind_of_memory(loaded, on_gpu):
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run on a tensor on cpu"):
        token_logprobs(torch.zeros(2, 4), torch.tensor([1, 2]), backend="cuda")
    with pytest.raises(BackendUnavailableError, match="'cython' cannot run on a tensor on cuda"):
        choose_backend("cython", on_gpu(), HALF)


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == 0 else capability)


def test_every_reason_why_the_extension_is_missing_is_named(monkeypatch, tmp_path):
    load = extension._load.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in load()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load() == "torch finds no NVIDIA GPU"
    pretend_gpu(monkeypatch, (7, 5))
    assert "compute capability 7.5, 8.0 is needed" in load()
    pretend_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "missing.so")
    assert "not built; build it with `RLHF_KERNELS_CUDA=1 pip install -e .`" in load()
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.setattr(extension, "LIBRARY", broken)
    assert "broken.so does not load" in load()


def test_the_choice_can_be_part_of_a_compiled_graph(monkeypatch, loaded):
    def either(x):
        return x + 1 if extension.why_missing() is None else x - 1

    compiled = torch.compile(either, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_importing_the_package_leaves_the_gpu_alone():
    code = "import torch, rlhf_kernels; from rlhf_kernels.cuda import extension as e; "
    code += "print(torch.cuda.is_initialized(), e._load.cache_info().currsize)"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "0"], done.stderr
