"""The CUDA kernels of log-probabilities and entropy, and their gradient, against float64 and bit by bit.

On a GPU where there is one, everywhere compiled for the CPU from their sources, as in the files of the other kernels.
"""

import math

import pytest
import torch
from cuda_kernels import DTYPES, SHORT_ROW_BYTES, random_case, run_script
from kernel_oracles import logp_and_entropy, same_bits

SHAPES = [(41, 401), (3, 1271), (1, 1), (6, 1), (0, 5), (2, 3, 17), (4, 2049), (2, 4097), (2, 50257), (9, 15), (3, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropy_equal_float64(kernels, shape, dtype, temperature):
    logits, labels = random_case(shape, dtype)
    logp, entropy, _ = kernels.token_logprobs(logits, labels, temperature)
    expected_logp, expected_entropy = logp_and_entropy(logits, labels, temperature)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected_logp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-6, atol=2e-5)
    alone, no_entropy, _ = kernels.token_logprobs(logits, labels, temperature, with_entropy=False)
    assert same_bits(alone, logp)
    assert no_entropy.shape == (0,)


@pytest.mark.parametrize(("rows", "vocabulary", "scale"), [(8, 50257, 3.0), (64, 258, 3.0), (8, 8192, 20.0)])
def test_the_error_is_no_larger_than_torchs_own(kernels, rows, vocabulary, scale):
    logits, labels = random_case((rows, vocabulary), scale=scale)
    logp, entropy, _ = kernels.token_logprobs(logits, labels)
    exact_logp, exact_entropy = logp_and_entropy(logits, labels)
    on_device = logits.to(kernels.device)
    torch_all = torch.log_softmax(on_device, -1)
    torch_entropy = -(torch_all.exp() * torch_all).sum(-1).cpu()
    torch_logp = torch_all.cpu().gather(-1, labels[:, None])[:, 0]
    slack = 2**-22  # the last bit of a result between 2 and 4
    assert (logp - exact_logp).abs().max() <= (torch_logp - exact_logp).abs().max() + slack
    assert (entropy - exact_entropy).abs().max() <= (torch_entropy - exact_entropy).abs().max() + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 401), (3, 1271), (7, 1), (0, 4), (2, 3, 17), (2, 20011)])
@pytest.mark.parametrize("used", ["logp", "entropy", "both"])
def test_the_gradient_equals_float64_autograd(kernels, shape, dtype, used):
    logits, labels = random_case(shape, dtype, scale=2.0)
    grad_logp = torch.randn(shape[:-1]) if used != "entropy" else None
    grad_entropy = torch.randn(shape[:-1]) if used != "logp" else None
    forward = kernels.token_logprobs(logits, labels, 0.9)
    gradient = kernels.backward(logits, labels, forward, grad_logp, grad_entropy, 0.9)
    assert gradient.dtype == dtype
    exact = logits.double().requires_grad_()
    all_logp = torch.log_softmax(exact / 0.9, -1)
    loss = torch.zeros((), dtype=torch.float64)
    if grad_logp is not None:
        loss = loss + (all_logp.gather(-1, labels[..., None])[..., 0] * grad_logp).sum()
    if grad_entropy is not None:
        loss = loss - ((all_logp.exp() * all_logp).sum(-1) * grad_entropy).sum()
    loss.backward()
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=tolerance, atol=max(2e-6, tolerance * 2**-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 31, 500, SHORT_ROW_BYTES // 4 + 9, SHORT_ROW_BYTES + 11])
def test_the_place_of_a_row_in_memory_changes_no_bit(kernels, vocabulary, dtype):
    logits, labels = random_case((1, vocabulary), dtype)
    grads = torch.randn(2, 1)
    results = []
    for offset in range(16 // logits.element_size()):
        memory = kernels.put(torch.full((vocabulary + 16,), math.nan, dtype=dtype))
        view = memory[offset : offset + vocabulary].view(1, -1)
        view.copy_(logits)
        forward = kernels.token_logprobs(view, labels)
        results.append([*forward, kernels.backward(view, labels, forward, grads[0], grads[1])])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(result.isfinite().all() for result in results[0])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :-1],
        lambda x: x[:, 1:, 3:90],
        lambda x: x.transpose(0, 1),
        lambda x: x[::2, ::3],
        lambda x: x.transpose(1, 2),
        lambda x: x[..., ::2],
        lambda x: x[1],
        lambda x: x[1, 2],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.unflatten(1, (4, 3)).transpose(0, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_bits_of_dense_rows(kernels, view, dtype):
    logits = view(kernels.put(torch.randn(4, 12, 100).to(dtype)))
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    grads = [torch.randn(labels.shape), torch.randn(labels.shape)]
    results = []
    for x in (logits, logits.clone(memory_format=torch.contiguous_format)):
        forward = kernels.token_logprobs(x, labels)
        results.append([*forward, kernels.backward(x, labels, forward, *grads)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_rows_that_are_no_distribution_give_nan_and_leave_the_others(kernels):
    for vocabulary in (300, 20_000):
        logits, labels = torch.randn(5, vocabulary), torch.zeros(5, dtype=torch.int64)
        clean = kernels.token_logprobs(logits, labels)
        logits[0, -1], logits[1, 17], logits[2] = math.nan, math.inf, -math.inf
        forward = kernels.token_logprobs(logits, labels)
        gradient = kernels.backward(logits, labels, forward, torch.ones(5), torch.ones(5))
        for got, before in zip(forward, clean, strict=True):
            assert got[:3].isnan().all()
            assert same_bits(got[3:], before[3:])
        assert gradient[:3].isnan().all()
        assert gradient[3:].isfinite().all()


def test_a_logit_of_minus_infinity_is_a_token_of_no_probability(kernels):
    logits = torch.randn(3, 40)
    logits[:, 5:30] = -math.inf
    labels = torch.tensor([0, 39, 10])  # the last label is a masked token
    forward = kernels.token_logprobs(logits, labels)
    without = torch.cat([logits[:, :5], logits[:, 30:]], 1)
    expected_logp, expected_entropy = logp_and_entropy(without, torch.tensor([0, 14, 0]))
    torch.testing.assert_close(forward[0][:2].double(), expected_logp[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(forward[1].double(), expected_entropy, rtol=1e-6, atol=1e-6)
    assert forward[0][2].item() == -math.inf
    gradient = kernels.backward(logits, labels, forward, torch.tensor([1.0, 1.0, 0.0]), torch.ones(3))
    assert gradient.isfinite().all()
    assert (gradient[:, 5:30] == 0).all()


def test_large_logits_lose_nothing(kernels):
    logits = torch.tensor([[1e4, 1e4 + 1, 1e4 - 2], [-3e38, 3e38, 0.0], [1e-30, 0.0, -1e-30]])
    labels = torch.tensor([0, 1, 2])
    got = kernels.token_logprobs(logits, labels)
    for g, e in zip(got, logp_and_entropy(logits, labels), strict=False):
        torch.testing.assert_close(g.double(), e, rtol=1e-6, atol=1e-6)


def test_ignored_rows_and_rows_without_upstream_gradient_are_not_read(kernels):
    logits, labels = random_case((6, 33))
    logits[2], logits[4], logits[5] = math.nan, math.inf, math.nan
    labels[2] = labels[4] = -100
    forward = kernels.token_logprobs(logits, labels, ignore_index=-100)
    assert (forward[0][[2, 4]] == 0).all()
    assert (forward[1][[2, 4]] == 0).all()
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0])
    gradient = kernels.backward(logits, labels, forward, upstream, None, ignore_index=-100)
    assert (gradient[[2, 4, 5]] == 0).all()
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 3]] != 0).any(1).all()


LABELS = """
import torch, sys
from pathlib import Path
from cuda_kernels import DeviceKernels, EmulatedKernels
kernels = DeviceKernels("cuda") if sys.argv[1] == "cuda" else EmulatedKernels(Path(sys.argv[1]))
kernels.token_logprobs(torch.zeros(3, 7), torch.tensor([0, int(sys.argv[2]), 1]))
"""


@pytest.mark.parametrize("label", [7, -1, -100])
def test_a_label_out_of_range_stops_with_its_value_and_row(kernels, emulated_library, label):
    device = "cuda" if kernels.device == "cuda" else emulated_library
    done = run_script(LABELS, device, label)
    assert done.returncode != 0
    assert f"rlhf_kernels: label {label} of row 1 is outside [0, 7)" in done.stdout + done.stderr
