"""The examples of kernels/README.md run, and give what the code that they replace gives."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[3] / "kernels" / "README.md"


def example(containing: str) -> str:
    blocks = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8").split("## In place of")[1], re.DOTALL
    )
    return next(block for block in blocks if containing in block)


def run(code: str, **names):
    exec(code, names)
    return names


@pytest.fixture
def model():
    hidden, input_ids = torch.randn(3, 8, 16), torch.randint(0, 50, (3, 8))
    lm_head = torch.nn.Linear(16, 50, bias=False)
    return hidden, input_ids, lm_head


def expected_logps(logits, input_ids):
    logp = torch.log_softmax(logits[:, :-1].double() / 0.9, -1)
    return logp.gather(-1, input_ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)


def test_logits_to_log_probabilities_and_entropy(model):
    hidden, input_ids, lm_head = model
    logits = lm_head(hidden).detach()
    got = run(example("token_logprobs(logits["), logits=logits, input_ids=input_ids)
    logp, entropy = expected_logps(logits, input_ids)
    torch.testing.assert_close(got["per_token_logps"].double(), logp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got["entropies"].double(), entropy, rtol=1e-6, atol=1e-5)


def test_hidden_states_to_log_probabilities(model):
    hidden, input_ids, lm_head = model
    got = run(example("linear_token_logprobs(hidden["), hidden=hidden, input_ids=input_ids, lm_head=lm_head)
    logp, _ = expected_logps(lm_head(hidden).detach(), input_ids)
    torch.testing.assert_close(got["per_token_logps"].detach().double(), logp, rtol=1e-6, atol=1e-5)
    got["per_token_logps"].sum().backward()
    assert lm_head.weight.grad is not None


def test_the_loop_over_time_steps_to_gae():
    """Right-padded responses: the usual loop with zeros for padding says the same of the tokens that count."""
    lengths = torch.tensor([7, 4, 1])
    response_mask = (torch.arange(7) < lengths[:, None]).long()
    rewards, values = (torch.randn(3, 7) * response_mask for _ in range(2))
    got = run(example("gae("), token_level_rewards=rewards, values=values, response_mask=response_mask)
    last, columns = torch.zeros(3), []
    for t in reversed(range(7)):
        following = values[:, t + 1] if t < 6 else torch.zeros(3)
        last = rewards[:, t] + 1.0 * following - values[:, t] + 1.0 * 0.95 * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], 1)
    inside = response_mask.bool()
    torch.testing.assert_close(got["returns"][inside], (advantages + values)[inside])
    counted = advantages[inside]
    white = (counted - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(got["advantages"][inside], white)
