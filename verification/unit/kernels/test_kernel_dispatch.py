import warnings

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import BackendUnavailableError, KernelFallbackWarning, dispatch, token_logprobs

LOGITS, LABELS = torch.zeros(2, 4), torch.tensor([1, 2])


def pretend_not_built(monkeypatch):
    reasons = {**dispatch._WHY_MISSING, "cython": "No module named 'rlhf_kernels.cpu._rows'"}
    monkeypatch.setattr(dispatch, "_WHY_MISSING", reasons)
    monkeypatch.setattr(dispatch, "_warned", set())


def test_the_public_api_is_what_the_package_lists():
    assert all(hasattr(rlhf_kernels, name) for name in rlhf_kernels.__all__)
    assert rlhf_kernels.available_backends()[0] == "reference"


def test_the_cython_kernels_are_built():
    assert "cython" in rlhf_kernels.available_backends(), dispatch._WHY_MISSING["cython"]


def test_a_missing_backend_raises_with_the_remedy(monkeypatch):
    pretend_not_built(monkeypatch)
    with pytest.raises(BackendUnavailableError, match=r"'cython' is not available \(No module .*pip install -e \."):
        token_logprobs(LOGITS, LABELS, backend="cython")


def test_auto_falls_back_to_the_reference_and_says_so_once(monkeypatch):
    pretend_not_built(monkeypatch)
    with pytest.warns(KernelFallbackWarning, match=r"slow reference code on cpu: .*pip install") as caught:
        token_logprobs(LOGITS, LABELS)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_logprobs(LOGITS, LABELS)


def test_the_cuda_backend_is_refused_for_a_tensor_in_main_memory():
    with pytest.raises(BackendUnavailableError, match="'cuda'"):
        token_logprobs(LOGITS, LABELS, backend="cuda")


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend is 'numba'; choose one of auto, reference, cython, cuda"):
        token_logprobs(LOGITS, LABELS, backend="numba")


def test_the_environment_chooses_where_the_caller_does_not(monkeypatch):
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    assert "Gather" in _names_of_graph(token_logprobs(logits, labels).grad_fn)
    assert "Gather" not in _names_of_graph(token_logprobs(logits, labels, backend="cython").grad_fn)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "fortran")
    with pytest.raises(ValueError, match="RLHF_KERNELS_BACKEND is 'fortran'; choose one of auto, reference, cython"):
        token_logprobs(logits, labels)


def test_an_empty_environment_variable_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "")
    assert dispatch.choose_backend("auto", LOGITS, (torch.float32,)) == "cython"
    assert rlhf_kernels.gelu(LOGITS.clone().requires_grad_()).grad_fn.name() == "_ApplyBackward"
    with pytest.raises(ValueError, match="^backend is ''; choose one of"):
        token_logprobs(LOGITS, LABELS, backend="")


def _names_of_graph(node):
    return "" if node is None else node.name() + "".join(_names_of_graph(parent) for parent, _ in node.next_functions)
