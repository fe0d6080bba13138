"""What only a GPU can show of the CUDA kernels: streams, graphs, autograd and compilation on it, very large tensors."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_kernels import CHUNK, OPERATORS, why_no_device_kernels
from kernel_oracles import gae_by_definition, logp_and_entropy, same_bits, whitened

import rlhf_kernels

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _kernels_on_a_device():
    if (reason := why_no_device_kernels()) is not None:
        pytest.skip(f"no CUDA kernels: {reason}")


def calls(device="cuda", vocabulary=5003):
    """One call of every operator on tensors of fixed shape; gae both with whole and with split rows."""
    logits = torch.randn(37, vocabulary, device=device)
    labels = torch.randint(0, vocabulary, (37,), device=device)
    statistics = OPERATORS.token_logprobs(logits, labels, 0.9, True, None)
    upstream = torch.randn(2, 37, device=device)
    many, long = torch.randn(1100, 70, device=device), torch.randn(3, 3 * CHUNK + 5, device=device)
    inside_many, inside_long = torch.rand_like(many) < 0.7, torch.rand_like(long) < 0.7
    return {
        "token_logprobs": lambda: OPERATORS.token_logprobs(logits, labels, 0.9, True, None),
        "token_logprobs bfloat16": lambda: OPERATORS.token_logprobs(logits.bfloat16(), labels, 0.9, True, None),
        "token_logprobs_backward": lambda: OPERATORS.token_logprobs_backward(
            logits, labels, statistics[2], statistics[1], upstream[0], upstream[1], 0.9, None
        ),
        "gae": lambda: OPERATORS.gae(many, many, inside_many, None, 0.99, 0.95),
        "gae in chunks": lambda: OPERATORS.gae(long, long, inside_long, None, 0.99, 0.95),
        "gae per token": lambda: OPERATORS.gae_per_token(
            long, long, inside_long, None, long.sigmoid(), None, 0.0, 0.95
        ),
        "whiten": lambda: OPERATORS.whiten(many, inside_many, True),
    }


NAMES = ["token_logprobs", "token_logprobs bfloat16", "token_logprobs_backward", "gae", "gae in chunks"]
NAMES += ["gae per token", "whiten"]


def tensors(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


@pytest.mark.parametrize("name", NAMES)
def test_repeated_calls_give_the_same_bits_beside_other_work(name):
    call, busy = calls()[name], torch.randn(2048, 2048, device="cuda")
    expected, other = tensors(call()), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            busy @ busy
        assert all(same_bits(a, b) for a, b in zip(tensors(call()), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_gives_the_bits_of_the_call(name):
    call = calls()[name]
    expected = tensors(call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # warms up, as torch asks for before a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(call())
    for result in captured:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_public_functions_can_be_captured():
    rewards = torch.randn(5, 300, device="cuda")
    mask, gamma = torch.rand_like(rewards) < 0.8, rewards.sigmoid()
    logits, labels = torch.randn(5, 300, device="cuda"), torch.randint(0, 300, (5,), device="cuda")

    def step():
        advantages, _ = rlhf_kernels.gae(rewards, rewards, mask, gamma=gamma, lam=0.95, backend="cuda")
        logp = rlhf_kernels.token_logprobs(logits, labels, backend="cuda")
        return [rlhf_kernels.whiten(advantages, mask, backend="cuda"), logp]

    expected, graph = step(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(captured, expected, strict=True))


def test_work_is_queued_on_the_current_stream():
    slow, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    logits, labels = torch.zeros(64, 5003, device="cuda"), torch.zeros(64, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = slow @ slow * 1e-3
        logits.fill_(0.0)[:, 0] = 10.0  # behind the products: a kernel on another stream would read the zeros
        logp = rlhf_kernels.token_logprobs(logits, labels, backend="cuda")
    stream.synchronize()
    assert float(logp[0]) == pytest.approx(10.0 - math.log(math.exp(10.0) + 5002), rel=1e-5)


def test_runs_on_the_device_of_the_tensors_and_leaves_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    for call in calls("cuda:1").values():
        results = tensors(call())
        assert all(t.device == torch.device("cuda:1") for t in results)
        assert all(same_bits(a, b) for a, b in zip(results, tensors(call()), strict=True))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_through_the_public_function_equals_float64(dtype):
    logits = (torch.randn(3, 41, 1271, device="cuda") * 2).to(dtype)
    labels = torch.randint(0, 1271, (3, 41), device="cuda")
    labels[0, :5] = -100
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    logp, entropy = rlhf_kernels.token_logprobs(
        x, labels, temperature=0.8, with_entropy=True, ignore_index=-100, backend="cuda"
    )
    (logp.sum() + entropy.square().sum()).backward()
    kept = labels != -100
    all_logp = torch.log_softmax(exact / 0.8, -1)
    exact_logp = all_logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * kept
    exact_entropy = -(all_logp.exp() * all_logp).sum(-1) * kept
    (exact_logp.sum() + exact_entropy.square().sum()).backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 2**-6)


@pytest.mark.parametrize("name", ["gae", "token_logprobs", "token_logprobs_backward", "whiten"])
def test_opcheck(name):
    logits, labels = torch.randn(6, 19, device="cuda"), torch.randint(0, 19, (6,), device="cuda")
    mask, grad = torch.rand_like(logits) < 0.5, torch.randn(6, device="cuda")
    arguments = {
        "gae": (logits, logits * 2, mask, None, 0.9, 0.8),
        "token_logprobs": (logits.clone().requires_grad_(), labels, 0.7, True, None),
        "token_logprobs_backward": (logits, labels, torch.zeros(6, 2, device="cuda"), grad, grad, grad, 1.0, None),
        "whiten": (logits, mask, True),
    }[name]
    torch.library.opcheck(getattr(OPERATORS, name), arguments)


def test_compiles_as_one_graph_with_the_same_result():
    def loss(logits, labels, rewards, mask):
        logp, entropy = rlhf_kernels.token_logprobs(logits, labels, temperature=0.9, with_entropy=True)
        advantages, _ = rlhf_kernels.gae(rewards, rewards * 0.5, mask, gamma=0.99, lam=0.95)
        return (logp * rlhf_kernels.whiten(advantages, mask)).sum() + 0.01 * entropy.sum()

    logits, labels = torch.randn(3, 7, 50, device="cuda"), torch.randint(0, 50, (3, 7), device="cuda")
    rewards = torch.randn(3, 7, device="cuda")
    mask = torch.rand_like(rewards) < 0.8
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        function(x, labels, rewards, mask).backward()
        gradients.append(x.grad)
    assert same_bits(*gradients)


def test_auto_takes_these_kernels_and_what_has_none_still_works(monkeypatch):
    logits, labels = torch.randn(5, 300, device="cuda"), torch.randint(0, 300, (5,), device="cuda")
    automatic = rlhf_kernels.token_logprobs(logits, labels)
    assert same_bits(automatic, rlhf_kernels.token_logprobs(logits, labels, backend="cuda"))
    torch.testing.assert_close(automatic.cpu().double(), logp_and_entropy(logits.cpu(), labels.cpu())[0])
    monkeypatch.setattr(rlhf_kernels.dispatch, "_warned", set())
    with pytest.warns(rlhf_kernels.KernelFallbackWarning, match="no kernel for cuda"):
        drawn = rlhf_kernels.sample_tokens(logits, torch.rand(5, device="cuda"))
    torch.testing.assert_close(drawn.logprobs, rlhf_kernels.token_logprobs(logits, drawn.ids), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    rows, vocabulary = 14_200, 151_936
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip(f"needs 12 GiB of GPU memory, {free >> 30} are free")
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    assert logits.numel() > 2**31
    x = logits.requires_grad_()
    logp, entropy = rlhf_kernels.token_logprobs(x, labels, with_entropy=True, backend="cuda")
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
    for row in (0, 7_000, rows - 1):
        exact_logp, exact_entropy = logp_and_entropy(logits.detach()[row : row + 1].cpu(), labels[row : row + 1].cpu())
        torch.testing.assert_close(logp[row : row + 1].detach().cpu().double(), exact_logp, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(entropy[row : row + 1].detach().cpu().double(), exact_entropy, rtol=2e-6, atol=2e-5)
        one = logits.detach()[row : row + 1].double().requires_grad_()
        all_logp = torch.log_softmax(one, -1)
        (all_logp[0, labels[row]] - (all_logp.exp() * all_logp).sum()).backward()
        torch.testing.assert_close(gradient[row : row + 1].double(), one.grad, rtol=2**-7, atol=1e-7)


EVERYTHING = """
import torch, rlhf_kernels
for vocabulary in (1, 7, 64, 257, 2500, 9001):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(5, vocabulary, device="cuda").to(dtype).requires_grad_()
        labels = torch.randint(0, vocabulary, (5,), device="cuda")
        logp, entropy = rlhf_kernels.token_logprobs(logits, labels, with_entropy=True, backend="cuda")
        torch.autograd.grad([logp, entropy], logits, [torch.ones_like(logp), torch.ones_like(entropy)])
for rows, tokens in ((3, 1), (3, 129), (2, 4100), (2, 4101), (1030, 5)):
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(rows, tokens, dtype=dtype, device="cuda")
        mask = torch.rand_like(x) < 0.5
        rlhf_kernels.gae(x, x, mask, gamma=0.99, lam=0.9, backend="cuda")
        rlhf_kernels.gae(x, x, mask, gamma=x.sigmoid(), lam=0.9, backend="cuda")
        rlhf_kernels.whiten(x, mask, backend="cuda")
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        pytest.skip("no compute-sanitizer")
    # every tensor is an allocation of its own, so that reading past one is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    done = subprocess.run(
        [*command, sys.executable, "-c", EVERYTHING],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "done" in done.stdout


def test_the_public_functions_equal_their_oracles_on_the_device():
    x, mask = torch.randn(9, 700, device="cuda"), torch.rand(9, 700, device="cuda") < 0.6
    torch.testing.assert_close(
        rlhf_kernels.whiten(x, mask, backend="cuda").cpu().double(), whitened(x.cpu(), mask.cpu()), rtol=1e-6, atol=1e-6
    )
    got = rlhf_kernels.gae(x, x * 0.5, mask, gamma=0.99, lam=0.9, backend="cuda")
    for g, e in zip(got, gae_by_definition(x.cpu(), x.cpu() * 0.5, mask.cpu(), 0.99, 0.9), strict=True):
        torch.testing.assert_close(g.cpu().double(), e, rtol=2e-6, atol=2e-6)
