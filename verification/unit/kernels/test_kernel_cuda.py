"""The CUDA kernels against float64: on a GPU where there is one, everywhere compiled for the CPU from their sources.

The emulation runs what a GPU would, thread by thread, so what it cannot show is left to `test_kernel_cuda_device.py`:
the processor's own exponential, streams, graphs and speed.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_kernels import (
    CHUNK,
    MANY_ROWS,
    SHORT_ROW_BYTES,
    DeviceKernels,
    EmulatedKernels,
    compile_emulation,
    why_no_device_kernels,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import gae_by_definition, logp_and_entropy, same_bits, whitened

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(41, 401), (3, 1271), (1, 1), (6, 1), (0, 5), (2, 3, 17), (4, 2049), (2, 4097), (2, 50257), (9, 15), (3, 16)]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(scope="session")
def emulated(emulated_library):
    return EmulatedKernels(emulated_library)


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.cuda)])
def kernels(request):
    if request.param == "device":
        if (reason := why_no_device_kernels()) is not None:
            pytest.skip(f"no CUDA kernels: {reason}")
        return DeviceKernels("cuda")
    emulated = request.getfixturevalue("emulated")
    emulated.set_order(0)
    return emulated


def random_case(shape, dtype=torch.float32, scale=4.0):
    return (torch.randn(shape) * scale).to(dtype), torch.randint(0, shape[-1], shape[:-1])


def gae_case(batch, tokens, dtype=torch.float32, density=0.7):
    rewards, values = torch.randn(batch, tokens, dtype=dtype), torch.randn(batch, tokens, dtype=dtype)
    return rewards, values, torch.rand(batch, tokens) < density, torch.randn(batch, dtype=dtype)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (41, 401),
        (3, 1271),
        (1, 1),
        (5, 1),
        (1, 17),
        (2, 0),
        (0, 7),
        (300, 20),
        (2, 512),
        (3, 4096),
        (2, 5003),
        (1, 20000),
    ],
)
@pytest.mark.parametrize("with_bootstrap", [False, True])
def test_gae_equals_the_sum_of_discounted_residuals(kernels, batch, tokens, dtype, with_bootstrap):
    rewards, values, mask, bootstrap = gae_case(batch, tokens, dtype)
    bootstrap = bootstrap if with_bootstrap else None
    got = kernels.gae(rewards, values, mask, bootstrap, 0.99, 0.9)
    if tokens <= 1271:
        expected = gae_by_definition(rewards, values, mask, 0.99, 0.9, bootstrap)
    else:  # the definition takes a time quadratic in the tokens
        from rlhf_kernels import reference

        wide = [rewards.double(), values.double(), mask, None if bootstrap is None else bootstrap.double()]
        expected = reference.gae(*wide, 0.99, 0.9)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    assert same_bits(got[1][mask], (got[0] + values)[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "tokens"), [(5, 401), (1, 1), (3, 512), (2, 2 * CHUNK + 57), (2, 0)])
@pytest.mark.parametrize("which", ["both", "gamma", "lam"])
def test_gae_takes_gamma_and_lambda_per_token(kernels, batch, tokens, dtype, which):
    rewards, values, mask, bootstrap = gae_case(batch, tokens, dtype)
    mask[0, CHUNK - 5 : CHUNK + 9] = False
    gammas, lams = (0.9 + 0.1 * torch.rand(batch, tokens, dtype=dtype) for _ in range(2))
    gammas[~mask] = lams[~mask] = math.nan
    gammas, lams = (None if which == "lam" else gammas), (None if which == "gamma" else lams)
    got = kernels.gae_per_token(rewards, values, mask, bootstrap, gammas, lams, 0.99, 0.95)
    expected = gae_by_definition(
        rewards, values, mask, 0.99 if gammas is None else gammas, 0.95 if lams is None else lams, bootstrap
    )
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    assert same_bits(got[1][mask], (got[0] + values)[mask])


def test_gae_per_token_splits_few_long_rows_and_gets_the_bits_of_whole_rows(kernels):
    rewards, values, mask, bootstrap = gae_case(2, CHUNK + 3)
    gammas, lams = torch.rand(2, 2, CHUNK + 3)
    few = kernels.gae_per_token(rewards, values, mask, bootstrap, gammas, lams)
    inputs = (rewards, values, mask, bootstrap, gammas, lams)
    whole = kernels.gae_per_token(*(x.repeat(MANY_ROWS // 2, *[1] * (x.dim() - 1)) for x in inputs))
    assert all(same_bits(a, b[:2]) for a, b in zip(few, whole, strict=True))


@pytest.mark.parametrize("tokens", [CHUNK + 1, CHUNK + 4])  # read word by word, and in vectors
def test_gae_splits_few_long_rows_and_gets_the_bits_of_whole_rows(kernels, tokens):
    rewards, values, mask, bootstrap = gae_case(3, tokens)
    mask[1, CHUNK - 5 :] = False  # the next value comes from across the border
    few = kernels.gae(rewards, values, mask, bootstrap)
    many = [x.repeat(math.ceil(MANY_ROWS / 3), *[1] * (x.dim() - 1)) for x in (rewards, values, mask, bootstrap)]
    launches = kernels.launches() if isinstance(kernels, EmulatedKernels) else 0
    whole = kernels.gae(*many)
    assert all(same_bits(a, b[:3]) for a, b in zip(few, whole, strict=True))
    if isinstance(kernels, EmulatedKernels):
        assert kernels.launches() == launches + 1
        kernels.gae(rewards, values, mask, bootstrap)
        assert kernels.launches() == launches + 4


@pytest.mark.parametrize("tokens", [57, 64, CHUNK + 7])
@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_gae_is_not_changed_by_what_lies_outside_the_mask(kernels, tokens, garbage):
    rewards, values, mask, bootstrap = gae_case(5, tokens)
    mask[3], mask[4] = False, True
    clean = kernels.gae(rewards, values, mask, bootstrap)
    rewards[~mask] = values[~mask] = garbage
    for a, b in zip(clean, kernels.gae(rewards, values, mask, bootstrap), strict=True):
        assert same_bits(a, b)
        assert (a[~mask] == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.9), (0.9, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)])
def test_gae_at_the_ends_of_its_parameters(kernels, gamma, lam):
    rewards, values, mask, bootstrap = gae_case(4, 300, torch.float64)
    got = kernels.gae(rewards, values, mask, bootstrap, gamma, lam)
    for g, e in zip(got, gae_by_definition(rewards, values, mask, gamma, lam, bootstrap), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_gae_spreads_nan_and_infinity_to_the_tokens_before_only(kernels):
    rewards, values, mask, _ = gae_case(2, 700, density=2.0)
    clean = kernels.gae(rewards, values, mask)[0]
    rewards[0, 300], rewards[1, 300] = math.nan, math.inf
    got = kernels.gae(rewards, values, mask)[0]
    assert got[0, :301].isnan().all()
    assert (got[1, :301] == math.inf).all()
    assert same_bits(got[:, 301:], clean[:, 301:])


def test_gae_takes_any_strides(kernels):
    rewards, values, mask, bootstrap = gae_case(12, 36)
    expected = kernels.gae(rewards, values, mask, bootstrap)
    strided = [kernels.put(t.t().contiguous()).t() for t in (rewards, values, mask)]
    every_second = kernels.put(torch.stack([bootstrap, bootstrap], 1).flatten())[::2]
    shifted = [kernels.put(torch.cat([t[:1, :1].expand(12, 1), t], 1))[:, 1:] for t in (rewards, values, mask)]
    flat = [kernels.put(torch.cat([t.flatten()[:1], t.flatten()]))[1:].view(12, 36) for t in (rewards, values, mask)]
    for tensors in (strided, shifted, flat):
        got = kernels.gae(*tensors, every_second)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(41, 401), (3, 1271), (1,), (0,), (2, 0, 3), (7, 11, 13), (4096,), (4097,), (40, 2000)]
)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_numpy(kernels, shape, dtype, shift_mean):
    x, mask = torch.randn(shape, dtype=dtype) * 3 + 2, torch.rand(shape) < 0.6
    got = kernels.whiten(x, mask, shift_mean)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), whitened(x, mask, shift_mean), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("garbage", [math.nan, 1e30, math.inf])
def test_whitening_is_not_changed_by_what_lies_outside_the_mask(kernels, garbage):
    x, mask = torch.randn(13, 501), torch.rand(13, 501) < 0.5
    mask.view(-1)[4096:] = False  # a chunk without a token
    clean = kernels.whiten(x, mask)
    x[~mask] = garbage
    assert same_bits(kernels.whiten(x, mask), clean)
    assert same_bits(kernels.whiten(x, torch.zeros_like(mask)), torch.zeros_like(x))


def test_whitening_does_not_lose_a_small_variance_beside_a_large_mean(kernels):
    x = 1e4 + torch.randn(10_000, dtype=torch.float64).mul(0.01)
    got = kernels.whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert abs(float(got.mean())) < 1e-6
    assert abs(float(got.var(correction=0)) - 1.0) < 2e-4  # the 1e-8 beside a variance of 1e-4


def test_whitening_takes_any_strides(kernels):
    x, mask = torch.randn(9, 14), torch.rand(9, 14) < 0.5
    strided = kernels.whiten(kernels.put(x.t().contiguous()).t(), kernels.put(mask.t().contiguous()).t())
    assert same_bits(strided, kernels.whiten(x, mask))


def everything(kernels, seed, rows, vocabulary, dtype):
    """The results of every kernel, forward and backward, on one random case with awkward rows."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rows + 3, vocabulary, generator=generator)
    logits = (random * 10 ** (seed % 4 - 2)).to(dtype)
    logits[-1], logits[-2, 0] = -math.inf, math.nan
    logits[0, : vocabulary // 3] = -math.inf
    labels = torch.randint(0, vocabulary, (rows + 3,), generator=generator)
    grads = torch.randn(2, rows + 3, generator=generator)
    forward = kernels.token_logprobs(logits, labels)
    mask = torch.rand(random.shape, generator=generator) < 0.7
    return [
        *forward,
        kernels.backward(logits, labels, forward, grads[0], grads[1]),
        *kernels.gae(random, random * random, mask, random[:, 0].contiguous()),
        *kernels.gae_per_token(random, random, mask, None, random.sigmoid(), None),
        kernels.whiten(random, mask),
    ]


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 300) | st.sampled_from([2047, 2048, 2049, 4100, 6145]),
    st.sampled_from(DTYPES),
    st.integers(1, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_the_order_in_which_threads_run_changes_no_bit(emulated, seed, rows, vocabulary, dtype, order):
    emulated.set_order(0)
    expected = everything(emulated, seed, rows, vocabulary, dtype)
    emulated.set_order(order)
    got = everything(emulated, seed, rows, vocabulary, dtype)
    emulated.set_order(0)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@given(st.integers(2, 12), st.integers(1, 700), st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_row_does_not_depend_on_the_rows_beside_it(emulated, rows, vocabulary, seed):
    torch.manual_seed(seed)
    logits, labels = random_case((rows, vocabulary))
    order = torch.randperm(rows)
    forward, moved = emulated.token_logprobs(logits, labels), emulated.token_logprobs(logits[order], labels[order])
    assert all(same_bits(a[order], b) for a, b in zip(forward, moved, strict=True))
    assert same_bits(emulated.token_logprobs(logits[-1:], labels[-1:])[0], forward[0][-1:])


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may die of what it does."""
    preamble = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    command = [sys.executable, "-c", preamble + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


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


FENCED = """
import sys, torch
from pathlib import Path
from cuda_kernels import EmulatedKernels
from fenced_memory import fenced as fenced_copy

kernels = EmulatedKernels(Path(sys.argv[1]))

def fenced(tensor, at_start):
    # vector reads are held to the tensor itself, but for what shares the first 16 bytes with it
    copy = fenced_copy(tensor, at_start)
    first = copy.data_ptr()
    kernels.allow(first // 16 * 16, first + copy.nbytes)
    return copy

for at_start in (True, False):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocabulary in (1, 2, 7, 8, 9, 15, 16, 17, 64, 250, 257, 2500, 4500, 9001):
            logits = fenced(torch.randn(3, vocabulary).to(dtype), at_start)
            labels = torch.tensor([0, vocabulary - 1, vocabulary // 2])
            forward = kernels.token_logprobs(logits, fenced(labels, at_start))
            assert forward[0].isfinite().all()
            kernels.backward(logits, labels, forward, torch.ones(3), torch.ones(3))
    for dtype in (torch.float32, torch.float64):
        for tokens in (1, 3, 4, 5, 127, 128, 129, 2047, 2048, 2049, 2052):
            x = fenced(torch.randn(3, tokens, dtype=dtype), at_start)
            mask = fenced(torch.rand(3, tokens) < 0.5, at_start)
            kernels.gae(x, x, mask, fenced(torch.randn(3, dtype=dtype), at_start))
            kernels.gae_per_token(x, x, mask, None, x, x)
            kernels.whiten(x, mask)
print("stayed inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
def test_nothing_outside_the_tensors_is_read(emulated_library):
    done = run_script(FENCED, emulated_library)
    assert done.stdout.strip() == "stayed inside", (done.returncode, done.stderr)
