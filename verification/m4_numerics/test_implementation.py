"""The numeric tests that any implementation can be held to: ``--implementation module:adapter``, ours by default.

Each compares float32 (or bfloat16) results with float64 written out in plain Python, gives the largest error, and fails
beyond a stated tolerance. Where conventions differ, the convention is named and its own error given: no failure.
"""

import math

import pytest
import torch

pytestmark = pytest.mark.m4
NAN, INF = float("nan"), float("inf")


def numbers(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
"""Right-padded rows of 4, 2, 5 and 1 tokens."""
LABELS = torch.tensor([[0, 7, 3, 11, 49], [5, 5, 30, 2, 1], [48, 9, 6, 17, 0]])


def log_softmax_row(row, temperature=1.0):
    scaled = [x / temperature for x in row]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def exact_logprobs(logits, labels, temperature=1.0):
    rows = zip(logits.double().flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True)
    return torch.tensor([log_softmax_row(row, temperature)[label] for row, label in rows], dtype=torch.float64).view(
        labels.shape
    )


def exact_entropies(logits):
    rows = [log_softmax_row(row) for row in logits.double().flatten(0, 1).tolist()]
    sums = [-math.fsum(math.exp(x) * x for x in row if x > -INF) for row in rows]
    return torch.tensor(sums, dtype=torch.float64).view(logits.shape[:-1])


def exact_gae(rewards, values, mask, gamma, lam):
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for row in range(len(rewards)):
        kept = [t for t in range(rewards.shape[1]) if mask[row, t]]
        r, v = ([float(x[row, t]) for t in kept] for x in (rewards, values))
        deltas = [r[i] + gamma * (v[i + 1] if i + 1 < len(v) else 0.0) - v[i] for i in range(len(r))]
        for i, t in enumerate(kept):
            advantages[row, t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(deltas)))
    return advantages


def exact_whiten(x, mask, shift_mean, *, sample=False):
    inside = [float(value) for value in x.double()[mask]]
    mean = math.fsum(inside) / len(inside)
    variance = math.fsum((value - mean) ** 2 for value in inside) / (len(inside) - sample)
    scale = 1.0 / math.sqrt(variance + 1e-8)
    return torch.where(mask, (x.double() - mean) * scale + (0.0 if shift_mean else mean), 0.0)


def error(found, exact):
    found, exact = torch.as_tensor(found).double(), torch.as_tensor(exact, dtype=torch.float64)
    if found.shape != exact.shape:
        raise ValueError(f"the result has shape {list(found.shape)}, and should have {list(exact.shape)}")
    difference = (found - exact).abs().max()
    return INF if difference.isnan() else float(difference)


# -- log-probs ---------------------------------------------------------------------------------------------------------


def test_logprobs_of_float32_logits(check):
    logits = numbers(3, 5, 50, scale=3.0)
    check("token_logprobs", lambda f: error(f(logits, LABELS, 1.0), exact_logprobs(logits, LABELS)), 5e-6)


def test_logprobs_at_a_temperature(check):
    logits = numbers(3, 5, 50, scale=3.0)
    check("token_logprobs", lambda f: error(f(logits, LABELS, 0.7), exact_logprobs(logits, LABELS, 0.7)), 1e-5)


def test_logprobs_of_logits_around_100(check):
    logits = numbers(3, 5, 50) + 100.0
    check("token_logprobs", lambda f: error(f(logits, LABELS, 1.0), exact_logprobs(logits, LABELS)), 2e-5)


def test_logprobs_of_a_vocabulary_with_forbidden_tokens(check):
    logits = numbers(3, 5, 50)
    logits[..., 12:17] = -INF
    check("token_logprobs", lambda f: error(f(logits, LABELS, 1.0), exact_logprobs(logits, LABELS)), 5e-6)


def test_logprobs_of_bfloat16_logits(check):
    logits = numbers(3, 5, 50, scale=3.0).bfloat16()
    exact = exact_logprobs(logits, LABELS)

    def rounded(f):
        found = f(logits, LABELS, 1.0)
        return error(found, exact) if found.dtype == torch.bfloat16 else INF

    convention = ("returns bfloat16", rounded, 2.0**-8 * 16)
    check("token_logprobs", lambda f: error(f(logits, LABELS, 1.0), exact), 1e-5, convention)


def test_logprobs_of_float64_logits(check):
    logits = numbers(3, 5, 50, scale=3.0).double()
    convention = (
        "divides by the temperature + 1e-7",
        lambda f: error(f(logits, LABELS, 1.0), exact_logprobs(logits, LABELS, 1.0 + 1e-7)),
        1e-12,
    )
    check("token_logprobs", lambda f: error(f(logits, LABELS, 1.0), exact_logprobs(logits, LABELS)), 1e-12, convention)


def test_gradient_of_the_logprobs(check):
    def found(f):
        logits = numbers(3, 5, 50, scale=3.0).requires_grad_()
        weights = numbers(3, 5, seed=1)
        (f(logits, LABELS, 1.0) * weights).sum().backward()
        p = torch.softmax(logits.detach().double(), dim=-1)
        one_hot = torch.nn.functional.one_hot(LABELS, 50)
        return error(logits.grad, weights.double()[..., None] * (one_hot - p))

    check("token_logprobs", found, 2e-6)


# -- entropy -----------------------------------------------------------------------------------------------------------


def test_entropy_of_float32_logits(check):
    logits = numbers(3, 5, 50, scale=3.0)
    check("entropy", lambda f: error(f(logits), exact_entropies(logits)), 5e-6)


def test_entropy_of_one_certain_token(check):
    logits = numbers(1, 2, 50)
    logits[..., 3] = 200.0
    check("entropy", lambda f: error(f(logits), exact_entropies(logits)), 1e-6)


def test_entropy_of_a_vocabulary_with_forbidden_tokens(check):
    logits = numbers(3, 5, 50)
    logits[..., 12:17] = -INF
    check("entropy", lambda f: error(f(logits), exact_entropies(logits)), 5e-6)


# -- advantages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae(check, gamma, lam):
    rewards, values = numbers(4, 5), numbers(4, 5, seed=1)
    values = torch.where(MASK, values, 100.0)
    exact = exact_gae(rewards, values, MASK, gamma, lam)

    def found(f):
        advantages, returns = f(rewards, values, MASK, gamma, lam)
        inside = torch.where(MASK, advantages, 0.0)
        back = torch.where(MASK, returns - values, 0.0)
        return max(error(inside, exact), error(back, exact))

    check("gae", found, 2e-6)


def test_gae_of_the_hand_worked_sequence(check):
    """r = [0, 1, 0], V = [.5, .25, 100], mask = [1, 1, 0], γ = 1, λ = .95: A = [.4625, .75]."""
    rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.25, 100.0]])
    mask = torch.tensor([[True, True, False]])
    check("gae", lambda f: error(f(rewards, values, mask, 1.0, 0.95)[0][:, :2], [[0.4625, 0.75]]), 1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(check, shift_mean):
    x = numbers(4, 5, scale=3.0) + 2.0
    convention = (
        "sample variance",
        lambda f: error(f(x, MASK, shift_mean), exact_whiten(x, MASK, shift_mean, sample=True)),
        5e-6,
    )
    check("whiten", lambda f: error(f(x, MASK, shift_mean), exact_whiten(x, MASK, shift_mean)), 5e-6, convention)


def test_whitening_of_nearly_equal_numbers(check):
    x = numbers(4, 5, scale=1e-3) + 50.0
    convention = ("sample variance", lambda f: error(f(x, MASK, True), exact_whiten(x, MASK, True, sample=True)), 1e-2)
    check("whiten", lambda f: error(f(x, MASK, True), exact_whiten(x, MASK, True)), 1e-2, convention)


def test_whitening_with_nan_outside_the_mask(check):
    x = numbers(4, 5)
    dirty = torch.where(MASK, x, NAN)
    convention = (
        "sample variance",
        lambda f: error(f(dirty, MASK, True), exact_whiten(x, MASK, True, sample=True)),
        5e-6,
    )
    check("whiten", lambda f: error(f(dirty, MASK, True), exact_whiten(x, MASK, True)), 5e-6, convention)


def test_mean_over_the_mask(check):
    x = numbers(4, 5)
    exact = math.fsum(x.double()[MASK].tolist()) / int(MASK.sum())
    check("masked_mean", lambda f: error(f(x, MASK), exact), 1e-6)


def test_mean_with_nan_outside_the_mask(check):
    x = numbers(4, 5)
    exact = math.fsum(x.double()[MASK].tolist()) / int(MASK.sum())
    check("masked_mean", lambda f: error(f(torch.where(MASK, x, NAN), MASK), exact), 1e-6)


def test_place_of_the_last_response_token(check):
    check("last_token_index", lambda f: error(f(MASK), [3, 1, 4, 0]), 0.0)


# -- KL and losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(check, estimator):
    logp, ref = numbers(4, 5) - 2.0, numbers(4, 5, seed=1) - 2.0
    x = logp.double() - ref.double()
    exact = {"k1": x, "k2": x * x / 2, "k3": (-x).exp() - 1 + x}[estimator]
    check("kl", lambda f: error(f(logp, ref, estimator), exact), 2e-6)


def test_k3_of_policies_that_hardly_differ(check):
    """At x = 3e-4, k3 = x²/2 − x³/6 … is below a ten-millionth: exp(−x) − 1 + x in float32 has no digit of it right.

    No x is a power of two, at some of which the roundings happen to cancel.
    """
    x = torch.tensor([[3e-4, 7e-4, 1.1e-3]])
    exact = (-x.double()).expm1() + x.double()
    check("kl", lambda f: error(f(x, torch.zeros_like(x), "k3").double() / exact, torch.ones(1, 3)), 1e-3)


def test_clipped_policy_loss_and_its_gradient(check):
    logp, old, advantages = numbers(4, 5, scale=0.5) - 2, numbers(4, 5, seed=1, scale=0.5) - 2, numbers(4, 5, seed=2)
    terms, slopes = [], torch.zeros(4, 5, dtype=torch.float64)
    n = int(MASK.sum())
    for row, t in MASK.nonzero().tolist():
        ratio = math.exp(float(logp[row, t]) - float(old[row, t]))
        a = float(advantages[row, t])
        clipped = min(max(ratio, 0.8), 1.2)
        terms.append(max(-ratio * a, -clipped * a))
        slopes[row, t] = -ratio * a / n if -ratio * a >= -clipped * a else 0.0

    def found(f):
        live = logp.clone().requires_grad_()
        loss = f(live, old, advantages, MASK, 0.2)
        loss.backward()
        return max(error(loss.detach(), math.fsum(terms) / n), error(live.grad, slopes))

    check("policy_loss", found, 2e-6)


def test_clipped_value_loss_and_its_gradient(check):
    values, old, returns = (numbers(4, 5, seed=seed) for seed in range(3))
    terms, slopes = [], torch.zeros(4, 5, dtype=torch.float64)
    n = int(MASK.sum())
    for row, t in MASK.nonzero().tolist():
        v, o, r = (float(x[row, t]) for x in (values, old, returns))
        near = o + min(max(v - o, -0.2), 0.2)
        terms.append(max((v - r) ** 2, (near - r) ** 2) / 2)
        if (v - r) ** 2 > (near - r) ** 2 or abs(v - o) < 0.2:
            slopes[row, t] = (v - r) / n

    def found(f):
        live = values.clone().requires_grad_()
        loss = f(live, old, returns, MASK, 0.2)
        loss.backward()
        return max(error(loss.detach(), math.fsum(terms) / n), error(live.grad, slopes))

    check("value_loss", found, 2e-6)
