"""The operators as torch sees them: schema, shapes without data, gradient registration, torch.compile."""

import pytest
import torch
from kernel_oracles import same_bits

import rlhf_kernels

if "cython" not in rlhf_kernels.available_backends():
    pytest.skip("the Cython kernels are not built", allow_module_level=True)


def cases():
    logits, labels = torch.randn(6, 19), torch.randint(0, 19, (6,))
    mask = torch.rand(6, 19) < 0.5
    operators = torch.ops.rlhf_kernels
    statistics, entropy, grad = torch.zeros(6, 2), torch.rand(6), torch.randn(6)
    yield operators.gae, (logits, logits * 2, mask, None, 0.9, 0.8)
    yield operators.gae, (logits.double(), logits.double(), mask, torch.randn(6).double(), 0.9, 0.8)
    yield operators.whiten, (logits, mask, True)
    yield operators.token_logprobs, (logits.clone().requires_grad_(), labels, 0.7, True, None)
    yield operators.token_logprobs, (logits.bfloat16().requires_grad_(), labels, 1.0, False, -100)
    yield (
        operators.token_logprobs,
        (torch.randn(2, 9, 7)[:, :-1].requires_grad_(), torch.zeros(2, 8).long(), 1.0, True, 0),
    )
    yield operators.token_logprobs_backward, (logits, labels, statistics, entropy, grad, grad, 1.0, None)
    yield operators.token_logprobs_backward, (logits, labels, statistics, entropy, None, grad, 1.0, None)
    yield operators.sample_tokens, (logits, torch.rand(6), 1.0, 3, 0.9)


@pytest.mark.parametrize("case", range(9))
def test_opcheck(case):
    operator, arguments = list(cases())[case]
    torch.library.opcheck(operator, arguments)


def loss(logits, labels, rewards, mask):
    logp, entropy = rlhf_kernels.token_logprobs(logits, labels, temperature=0.9, with_entropy=True)
    advantages, _ = rlhf_kernels.gae(rewards, rewards * 0.5, mask, gamma=0.99, lam=0.95)
    return (logp * rlhf_kernels.whiten(advantages, mask)).sum() + 0.01 * entropy.sum()


def test_compiles_as_one_graph_with_the_same_result():
    logits, labels = torch.randn(3, 7, 50), torch.randint(0, 50, (3, 7))
    rewards, mask = torch.randn(3, 7), torch.rand(3, 7) < 0.8
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        x = logits.clone().requires_grad_()
        value = function(x, labels, rewards, mask)
        value.backward()
        gradients.append((value.detach(), x.grad))
    assert same_bits(gradients[0][1], gradients[1][1])
    torch.testing.assert_close(gradients[0][0], gradients[1][0])


def test_runs_under_inference_mode_autocast_and_on_fake_tensors():
    logits, labels = torch.randn(4, 9), torch.randint(0, 9, (4,))
    expected = rlhf_kernels.token_logprobs(logits, labels)
    with torch.inference_mode():
        assert same_bits(rlhf_kernels.token_logprobs(logits, labels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(rlhf_kernels.token_logprobs(logits, labels), expected)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = rlhf_kernels.token_logprobs(mode.from_tensor(logits), mode.from_tensor(labels))
        assert fake.shape == (4,)
