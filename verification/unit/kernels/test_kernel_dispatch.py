import warnings

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import BackendUnavailableError, KernelFallbackWarning, attention, dispatch, token_logprobs
from rlhf_kernels.attention import Cache, attend

LOGITS, LABELS = torch.zeros(2, 4), torch.tensor([1, 2])
HEADS, STARTS, LENGTHS = torch.ones(2, 1, 4), torch.tensor([0, 1, 2]), torch.tensor([1, 1])
BY_BACKEND = {
    "gae": lambda x, **options: rlhf_kernels.gae(x, x, x > 1.0, gamma=1.0, lam=1.0, **options),
    "token_logprobs": lambda x, **options: token_logprobs(x, LABELS, **options),
    "linear_token_logprobs": lambda x, **options: rlhf_kernels.linear_token_logprobs(
        x, x.repeat(2, 1), LABELS, **options
    ),
    "sample_tokens": lambda x, **options: rlhf_kernels.sample_tokens(x, torch.zeros(2), **options),
    "whiten": lambda x, **options: rlhf_kernels.whiten(x, x > 1.0, **options),
}
OF_TENSORS = {
    "linear": lambda x: rlhf_kernels.linear(x, x),
    "linear of what torch broadcasts": lambda x: rlhf_kernels.linear(x, x, x[0, 0]),
    "gelu": rlhf_kernels.gelu,
    "silu": rlhf_kernels.silu,
    "layer_norm": lambda x: rlhf_kernels.layer_norm(x, x[0], x[1]),
    "layer_norm of what does not fit": lambda x: rlhf_kernels.layer_norm(x, x[0], x[1, :1]),
    "rms_norm": lambda x: rlhf_kernels.rms_norm(x, x[0]),
    "sum_of_squares": rlhf_kernels.sum_of_squares,
    "sums_of_squares": lambda x: rlhf_kernels.sums_of_squares([x, x]),
    "sums_of_squares of none": lambda x: rlhf_kernels.sums_of_squares([]),
}
ATTENTION = {
    "attend": lambda: attend(HEADS, HEADS, HEADS, STARTS, 0.3),
    "Cache": lambda: Cache(HEADS, HEADS, STARTS, 1),
}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BY_BACKEND | OF_TENSORS)
def test_an_unknown_backend_in_the_environment_is_refused_by_every_function(name, dtype, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "fortran")
    message = "^RLHF_KERNELS_BACKEND is 'fortran'; choose one of auto, reference, cython, cuda$"
    with pytest.raises(ValueError, match=message):
        (BY_BACKEND | OF_TENSORS)[name](LOGITS.to(dtype))
    if name in BY_BACKEND:
        for backend in ("cython", "reference"):
            with pytest.raises(ValueError, match=message):
                BY_BACKEND[name](LOGITS, backend=backend)


def test_an_unknown_backend_in_the_environment_is_refused_by_attention(monkeypatch):
    cache = Cache(HEADS, HEADS, STARTS, 1)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "fortran")
    for call in (*ATTENTION.values(), lambda: cache.attend(HEADS, HEADS, HEADS, LENGTHS, 0.3)):
        with pytest.raises(ValueError, match="^RLHF_KERNELS_BACKEND is 'fortran'; choose one of"):
            call()


@pytest.mark.parametrize("name", [name for name in OF_TENSORS if "does not fit" not in name])
def test_what_has_no_reference_is_torchs_own_where_the_environment_asks_for_it(name, monkeypatch):
    x = torch.randn(2, 4)
    native = OF_TENSORS[name](x)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    leaf = x.clone().requires_grad_()
    found = OF_TENSORS[name](leaf)
    if isinstance(found, torch.Tensor):
        assert "Apply" not in found.grad_fn.name()
        assert "_Linear" not in found.grad_fn.name()
    torch.testing.assert_close(found, native)


def test_attention_has_native_code_alone_and_says_what_turns_it_off(monkeypatch):
    cache = Cache(HEADS, HEADS, STARTS, 1)
    calls = (*ATTENTION.values(), lambda: cache.attend(HEADS, HEADS, HEADS, LENGTHS, 0.3))
    with monkeypatch.context() as patch:
        patch.setenv("RLHF_KERNELS_BACKEND", "reference")
        for call in calls:
            with pytest.raises(
                BackendUnavailableError, match="RLHF_KERNELS_BACKEND is 'reference', which turns it off"
            ):
                call()
        with pytest.raises(
            TypeError, match=r"^query is torch\.float64 on cpu; native attention takes float32 on the CPU"
        ):
            attend(HEADS.double(), HEADS, HEADS, STARTS, 0.3)
    monkeypatch.setattr(attention, "_native", None)
    for call in calls:
        with pytest.raises(BackendUnavailableError, match=r"not available; build it with `pip install -e \.`"):
            call()


def test_attention_says_which_tensor_is_not_plain():
    with pytest.raises(TypeError, match="query is a Tensor, key is a Other, .* takes plain tensors"):
        attend(HEADS, HEADS.as_subclass(Other), HEADS, STARTS, 0.3)


class Other(torch.Tensor):
    """A subclass, which may have no memory of its own."""


def test_an_empty_environment_variable_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "")
    assert dispatch.choose_backend("auto", LOGITS, (torch.float32,)) == "cython"
    assert rlhf_kernels.gelu(LOGITS.clone().requires_grad_()).grad_fn.name() == "_ApplyBackward"
    with pytest.raises(ValueError, match="^backend is ''; choose one of"):
        token_logprobs(LOGITS, LABELS, backend="")


def _names_of_graph(node):
    return "" if node is None else node.name() + "".join(_names_of_graph(parent) for parent, _ in node.next_functions)
