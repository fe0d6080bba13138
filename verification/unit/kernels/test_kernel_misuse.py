"""What a function does with tensors, defaults and shapes that it was not made for: an error, or torch's own result."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import rlhf_kernels
from rlhf_kernels.attention import Cache, attend

HIDDEN, WEIGHT = torch.linspace(-1, 1, 37 * 8).view(37, 8), torch.linspace(-2, 1, 50 * 8).view(50, 8).sin()
LABELS = torch.arange(37)
QUERY = torch.linspace(-1, 1, 4 * 2 * 8).view(4, 2, 8)
STARTS = torch.tensor([0, 4])


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def log_probs_and_gradients(**options):
    hidden, weight, bias = (x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, WEIGHT[:, 0]))
    both = rlhf_kernels.linear_token_logprobs(hidden, weight, LABELS, bias=bias, with_entropy=True, **options)
    return *both, *torch.autograd.grad(both[0].sum() + both[1].sum(), (hidden, weight, bias))


@pytest.mark.parametrize("options", [{}, {"keep_logits": True}, {"ignore_index": 3}], ids=str)
def test_torchs_default_dtype_changes_no_bit(default_dtype, options):
    expected = log_probs_and_gradients(**options)
    torch.set_default_dtype(default_dtype)
    for found, wanted in zip(log_probs_and_gradients(**options), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_torchs_default_device_changes_no_bit():
    expected = log_probs_and_gradients(keep_logits=True)
    with torch.device("meta"):
        found = rlhf_kernels.linear_token_logprobs(HIDDEN, WEIGHT.clone().requires_grad_(), LABELS, keep_logits=True)
    assert found.device.type == "cpu"
    assert expected[0].shape == found.shape


@pytest.mark.parametrize("parameter", [torch.ones(3), torch.ones(()), torch.ones(8)], ids=["short", "scalar", "long"])
def test_a_norm_whose_parameters_do_not_fit_is_an_error(parameter):
    with pytest.raises(RuntimeError):
        rlhf_kernels.layer_norm(torch.ones(2, 4), parameter, parameter)
    with pytest.raises(RuntimeError):
        rlhf_kernels.layer_norm(torch.ones(2, 4), torch.ones(4), parameter)
    with pytest.raises(RuntimeError):
        rlhf_kernels.rms_norm(torch.ones(2, 4), parameter)


def test_a_bias_that_is_no_row_is_what_torch_makes_of_it():
    for bias in (torch.ones(1), torch.ones(()), torch.arange(24.0).view(4, 6)):
        x, weight = QUERY[:, 0], WEIGHT[:6]
        torch.testing.assert_close(rlhf_kernels.linear(x, weight, bias), x @ weight.T + bias)
    with pytest.raises(RuntimeError):
        rlhf_kernels.linear(QUERY[:, 0], WEIGHT[:6], torch.ones(60))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QUERY, QUERY, QUERY, torch.tensor([0, 5000])), ValueError, r"starts is \[0, 5000\].* 4 tokens"),
        ((QUERY, QUERY, QUERY, torch.tensor([0, 3, 2, 4])), ValueError, "it must go up"),
        ((QUERY, QUERY, QUERY, torch.tensor([], dtype=torch.int64)), ValueError, r"starts is \[\]"),
        ((QUERY, QUERY, QUERY, STARTS.int()), TypeError, "starts must be torch.int64"),
        ((QUERY.bfloat16(), QUERY, QUERY, STARTS), TypeError, "query is torch.bfloat16 on cpu"),
        ((QUERY, QUERY.double(), QUERY, STARTS), TypeError, "key is torch.float64"),
        ((QUERY.to("meta"), QUERY, QUERY, STARTS), TypeError, "on meta"),
        ((QUERY.repeat(100, 1, 1), QUERY, QUERY, STARTS), ValueError, "key must have shape"),
        ((QUERY, QUERY, QUERY[:, :, :4], STARTS), ValueError, "value must have shape"),
        ((QUERY.repeat(1, 2, 1)[:, :3], QUERY, QUERY, STARTS), ValueError, "3 heads, which the 2 of key"),
    ],
)
def test_attention_names_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        attend(*arguments, 0.3)


@pytest.mark.parametrize(
    ("rows", "lengths", "error", "message"),
    [
        (2, torch.tensor([2, -5]), ValueError, r"lengths is \[2, -5\]"),
        (2, torch.tensor([2, 99]), ValueError, "a row has 100"),
        (2, torch.tensor([2, 2], dtype=torch.int32), TypeError, "lengths must be torch.int64"),
        (50, torch.full((50,), 2), ValueError, "key must have shape"),
    ],
)
def test_a_cache_names_what_does_not_fit(rows, lengths, error, message):
    cache = Cache(QUERY, QUERY, torch.tensor([0, 2, 4]), more=3)
    token = torch.ones(rows, 2, 8)
    with pytest.raises(error, match=message):
        cache.attend(token, token, token, lengths, 0.3)


def test_tensors_without_memory_of_their_own_are_left_to_torch():
    with FakeTensorMode():
        fake = torch.ones(4, 8)
        assert rlhf_kernels.gelu(fake).shape == fake.shape
        assert rlhf_kernels.linear(fake, torch.ones(3, 8)).shape == (4, 3)
        assert rlhf_kernels.layer_norm(fake, torch.ones(8), torch.ones(8)).shape == fake.shape


def test_what_is_negative_by_a_flag_is_negative():
    x = torch._neg_view(QUERY)
    torch.testing.assert_close(rlhf_kernels.gelu(x), rlhf_kernels.gelu(-QUERY))
    torch.testing.assert_close(rlhf_kernels.linear(x, WEIGHT), rlhf_kernels.linear(-QUERY, WEIGHT))


SECOND = {
    "linear": lambda x: rlhf_kernels.linear(x, WEIGHT),
    "gelu": rlhf_kernels.gelu,
    "layer_norm": lambda x: rlhf_kernels.layer_norm(x, torch.ones(8), torch.ones(8)),
    "attend": lambda x: attend(x.view(-1, 1, 8), x.view(-1, 1, 8), x.view(-1, 1, 8), torch.tensor([0, len(x)]), 0.3),
    "keep_logits": lambda x: rlhf_kernels.linear_token_logprobs(
        x, WEIGHT.clone().requires_grad_(), LABELS, keep_logits=True
    ),
}


@pytest.mark.parametrize("function", SECOND.values(), ids=SECOND.keys())
def test_a_second_derivative_is_refused_and_not_left_out(function):
    x = HIDDEN.clone().requires_grad_()
    result = function(x).sum()
    (gradient,) = torch.autograd.grad(result, x, create_graph=True)
    (once,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(gradient, once)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (result + gradient.square().sum()).backward()


def test_a_gradient_of_the_temperature_is_refused():
    temperature = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(ValueError, match="temperature has no gradient"):
        rlhf_kernels.token_logprobs(WEIGHT, torch.zeros(50, dtype=torch.int64), temperature=temperature)


def test_squares_of_a_generator_are_added_up():
    assert rlhf_kernels.sums_of_squares(x for x in (torch.ones(3), torch.full((2,), 2.0))) == [3.0, 8.0]


def test_the_reference_ranks_equal_log_probabilities_by_their_logits():
    for backend in ("cython", "reference"):
        drawn = rlhf_kernels.sample_tokens(
            torch.tensor([[0.0, 1e-14, 1000.0]]), torch.zeros(1), top_k=2, temperature=1000.0, backend=backend
        )
        assert drawn.ids.tolist() == [1], backend


@pytest.mark.parametrize("keep_logits", [False, True])
def test_the_head_compiles(keep_logits):
    def log_probs(weight):
        return rlhf_kernels.linear_token_logprobs(HIDDEN, weight, LABELS, keep_logits=keep_logits)

    weight = WEIGHT.clone().requires_grad_()
    compiled = torch.compile(log_probs, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight), log_probs(weight))


def test_a_linear_layer_compiles_as_a_whole():
    compiled = torch.compile(rlhf_kernels.linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(HIDDEN, WEIGHT), rlhf_kernels.linear(HIDDEN, WEIGHT))
