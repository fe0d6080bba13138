"""What a function does with tensors, defaults and shapes that it was not made for: an error, or torch's own result."""

import re

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


ROWS, UNIFORMS = HIDDEN[:4], torch.full((4,), 0.5)
ONES = torch.ones(4, 8)
MISUSED = {
    "rewards": lambda wrong: rlhf_kernels.gae(wrong, ONES, ONES, gamma=1.0, lam=1.0),
    "values": lambda wrong: rlhf_kernels.gae(ONES, wrong, ONES, gamma=1.0, lam=1.0),
    "mask": lambda wrong: rlhf_kernels.gae(ONES, ONES, wrong, gamma=1.0, lam=1.0),
    "logits": lambda wrong: rlhf_kernels.token_logprobs(wrong, LABELS[:4]),
    "labels": lambda wrong: rlhf_kernels.token_logprobs(ROWS, wrong),
    "hidden": lambda wrong: rlhf_kernels.linear_token_logprobs(wrong, WEIGHT, LABELS),
    "weight": lambda wrong: rlhf_kernels.linear_token_logprobs(HIDDEN, wrong, LABELS),
    "labels of linear": lambda wrong: rlhf_kernels.linear_token_logprobs(HIDDEN, WEIGHT, wrong),
    "logits of sampling": lambda wrong: rlhf_kernels.sample_tokens(wrong, UNIFORMS),
    "uniforms": lambda wrong: rlhf_kernels.sample_tokens(ROWS, wrong),
    "x": lambda wrong: rlhf_kernels.whiten(wrong, ONES),
    "mask of whiten": lambda wrong: rlhf_kernels.whiten(ONES, wrong),
    "x of linear": lambda wrong: rlhf_kernels.linear(wrong, WEIGHT),
    "weight of linear": lambda wrong: rlhf_kernels.linear(HIDDEN, wrong),
    "x of gelu": lambda wrong: rlhf_kernels.gelu(wrong),
    "x of silu": lambda wrong: rlhf_kernels.silu(wrong),
    "weight of layer_norm": lambda wrong: rlhf_kernels.layer_norm(ROWS, wrong, ONES[0]),
    "bias of layer_norm": lambda wrong: rlhf_kernels.layer_norm(ROWS, ONES[0], wrong),
    "weight of rms_norm": lambda wrong: rlhf_kernels.rms_norm(ROWS, wrong),
    "x of sum_of_squares": lambda wrong: rlhf_kernels.sum_of_squares(wrong),
    "query": lambda wrong: attend(wrong, QUERY, QUERY, STARTS, 0.3),
    "value of attend": lambda wrong: attend(QUERY, QUERY, wrong, STARTS, 0.3),
    "starts": lambda wrong: attend(QUERY, QUERY, QUERY, wrong, 0.3),
}


@pytest.mark.parametrize("name", MISUSED)
@pytest.mark.parametrize("wrong", [None, [1, 2]], ids=str)
def test_what_is_no_tensor_is_named_with_its_value(name, wrong):
    with pytest.raises(TypeError, match=rf"^{name.split()[0]} is {re.escape(str(wrong))}; it must be a torch.Tensor$"):
        MISUSED[name](wrong)


def test_an_optional_tensor_that_is_none_is_named_too():
    with pytest.raises(TypeError, match=r"^bootstrap is 0\.5; it must be a torch\.Tensor$"):
        rlhf_kernels.gae(ONES, ONES, ONES, gamma=1.0, lam=1.0, bootstrap=0.5)
    with pytest.raises(TypeError, match=r"^bias is True; it must be a torch\.Tensor$"):
        rlhf_kernels.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, bias=True)


NUMBERS = {
    "temperature": (lambda x: rlhf_kernels.token_logprobs(ROWS, LABELS[:4], temperature=x), "a finite number of at"),
    "temperature of linear": (
        lambda x: rlhf_kernels.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, temperature=x),
        "a finite number of at least 1e-30",
    ),
    "temperature of sampling": (lambda x: rlhf_kernels.sample_tokens(ROWS, UNIFORMS, temperature=x), "a finite number"),
    "top_k": (lambda x: rlhf_kernels.sample_tokens(ROWS, UNIFORMS, top_k=x), r"a whole number, 0 \(off\) or positive"),
    "top_p": (lambda x: rlhf_kernels.sample_tokens(ROWS, UNIFORMS, top_p=x), r"a number in \(0, 1\]; 1.0 is off"),
    "gamma": (lambda x: rlhf_kernels.gae(ONES, ONES, ONES, gamma=x, lam=1.0), r"a number in \[0, 1\]"),
    "lam": (lambda x: rlhf_kernels.gae(ONES, ONES, ONES, gamma=1.0, lam=x), r"a number in \[0, 1\]"),
    "scale": (lambda x: attend(QUERY, QUERY, QUERY, STARTS, x), "a finite number"),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("wrong", [None, "1", (1, 2)], ids=str)
def test_what_is_no_number_is_named_with_its_value_and_what_it_must_be(name, wrong):
    call, rule = NUMBERS[name]
    with pytest.raises(TypeError, match=rf"^{name.split()[0]} is {re.escape(repr(wrong))}; it must be {rule}"):
        call(wrong)


def test_a_number_that_must_be_whole_is_named_where_it_is_not():
    with pytest.raises(TypeError, match=r"^top_k is 2\.5; it must be a whole number"):
        rlhf_kernels.sample_tokens(ROWS, UNIFORMS, top_k=2.5)
    for call in (
        lambda: rlhf_kernels.token_logprobs(ROWS, LABELS[:4], ignore_index=-100.5),
        lambda: rlhf_kernels.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, ignore_index=-100.5),
    ):
        with pytest.raises(TypeError, match=r"^ignore_index is -100\.5; it must be a whole number, or None"):
            call()


def test_a_temperature_of_several_numbers_or_of_none_is_no_number():
    for temperature in (torch.ones(2), torch.ones((), device="meta")):
        with pytest.raises(TypeError, match="temperature is tensor.*; it must be a finite number"):
            rlhf_kernels.token_logprobs(ROWS, LABELS[:4], temperature=temperature)
    one = rlhf_kernels.token_logprobs(ROWS, LABELS[:4], temperature=torch.tensor(0.5))
    assert torch.equal(one, rlhf_kernels.token_logprobs(ROWS, LABELS[:4], temperature=0.5))


def test_labels_of_another_dtype_are_named_with_what_makes_them_fit():
    for call in (
        lambda labels: rlhf_kernels.token_logprobs(ROWS, labels[:4]),
        lambda labels: rlhf_kernels.linear_token_logprobs(HIDDEN, WEIGHT, labels),
    ):
        with pytest.raises(TypeError, match=r"labels must be torch\.int64, got torch\.int32; pass labels\.long\(\)$"):
            call(LABELS.int())
    with pytest.raises(TypeError, match=r"starts must be torch\.int64, got torch\.int32; pass starts\.long\(\)$"):
        attend(QUERY, QUERY, QUERY, STARTS.int(), 0.3)


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
