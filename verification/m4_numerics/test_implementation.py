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
HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
"""Rows of which single tokens do not count, as those that a tool wrote."""
rubbish = pytest.mark.parametrize("filling", [NAN, INF])
ranges = pytest.mark.parametrize("clip_range", [0.1, 0.2, 0.4])
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


def exact_policy_loss(logp, old, advantages, mask, clip_range):
    """Return the mean over the mask of max(−ρA, −clip(ρ)A), and its gradient."""
    terms, slopes, n = [], torch.zeros(mask.shape, dtype=torch.float64), int(mask.sum())
    for row, t in mask.nonzero().tolist():
        ratio, a = math.exp(float(logp[row, t]) - float(old[row, t])), float(advantages[row, t])
        clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
        terms.append(max(-ratio * a, -clipped * a))
        slopes[row, t] = -ratio * a / n if -ratio * a >= -clipped * a else 0.0
    return math.fsum(terms) / n, slopes


def exact_value_loss(values, old_values, returns, mask, clip_range):
    """Return half the mean over the mask of max((V−R)², (V_old + clip(V−V_old) − R)²), and its gradient."""
    terms, slopes, n = [], torch.zeros(mask.shape, dtype=torch.float64), int(mask.sum())
    for row, t in mask.nonzero().tolist():
        v, old, r = (float(x[row, t]) for x in (values, old_values, returns))
        near = old + min(max(v - old, -clip_range), clip_range)
        terms.append(max((v - r) ** 2, (near - r) ** 2) / 2)
        if (v - r) ** 2 > (near - r) ** 2 or abs(v - old) < clip_range:
            slopes[row, t] = (v - r) / n
    return math.fsum(terms) / n, slopes


def error(found, exact, mask=None):
    """Return the largest error, on the mask alone where one is given; infinity stands for a NaN."""
    found, exact = torch.as_tensor(found).double(), torch.as_tensor(exact, dtype=torch.float64)
    if found.shape != exact.shape:
        raise ValueError(f"the result has shape {list(found.shape)}, and should have {list(exact.shape)}")
    if mask is not None:
        found = torch.where(mask, found, exact)
    difference = (found - exact).abs().max()
    return INF if difference.isnan() else float(difference)


def gradient_error(loss, leaf, exact):
    """Return the largest error of a gradient; infinity where there is none."""
    if not loss.requires_grad:
        return INF
    return error(torch.autograd.grad(loss, leaf)[0], exact)


def constant(result_of):
    """Return the convention by which a result is a constant, as what is only logged or rewarded can be."""
    return "a constant", lambda f: INF if result_of(f).requires_grad else 0.0, 0.0


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


def test_gradient_of_the_entropy(check):
    """∂H/∂z_v = −p_v (log p_v + H)."""
    weights = numbers(3, 5, seed=1)

    def found(f):
        logits = numbers(3, 5, 50, scale=3.0).requires_grad_()
        logp = torch.log_softmax(logits.detach().double(), dim=-1)
        entropies = -(logp.exp() * logp).sum(dim=-1, keepdim=True)
        return gradient_error(
            (f(logits) * weights).sum(), logits, -weights[..., None] * logp.exp() * (logp + entropies)
        )

    check("entropy", found, 2e-6, constant(lambda f: f(numbers(3, 5, 50).requires_grad_())))


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


def test_gae_over_a_mask_with_holes(check):
    """What does not count is no step: the next value is that of the next token that counts."""
    rewards, values = numbers(4, 5), torch.where(HOLES, numbers(4, 5, seed=1), 100.0)
    exact = exact_gae(rewards, values, HOLES, 0.9, 0.5)
    check("gae", lambda f: error(f(rewards, values, HOLES, 0.9, 0.5)[0], exact, HOLES), 2e-6)


@rubbish
def test_gae_with_rubbish_outside_the_mask(check, filling):
    rewards, values = numbers(4, 5), numbers(4, 5, seed=1)
    exact = exact_gae(rewards, values, MASK, 0.9, 0.5)
    dirty = [torch.where(MASK, x, filling) for x in (rewards, values)]

    def found(f):
        advantages, returns = f(*dirty, MASK, 0.9, 0.5)
        return max(error(advantages, exact, MASK), error(returns, exact + values, MASK))

    check("gae", found, 2e-6)


def whitening(x, mask, shift_mean, tolerance, given=None):
    """Return what ``check`` takes: the error of whitening, its tolerance, and that under the sample variance."""
    given = x if given is None else given

    def against(**variance):
        return lambda f: error(f(given, mask, shift_mean), exact_whiten(x, mask, shift_mean, **variance), mask)

    return against(), tolerance, ("sample variance", against(sample=True), tolerance)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(check, shift_mean):
    check("whiten", *whitening(numbers(4, 5, scale=3.0) + 2.0, MASK, shift_mean, 5e-6))


def test_whitening_of_nearly_equal_numbers(check):
    """Around 50, ±0.01. An epsilon of 1e-8 added to the variance, or of up to 1e-5 to its root, is within 5e-3."""
    check("whiten", *whitening(numbers(4, 5, scale=1e-2) + 50.0, MASK, True, 5e-3))


def test_whitening_over_a_mask_with_holes(check):
    check("whiten", *whitening(numbers(4, 5, scale=3.0) + 2.0, HOLES, True, 5e-6))


def test_whitening_with_nan_outside_the_mask(check):
    x = numbers(4, 5)
    check("whiten", *whitening(x, MASK, True, 5e-6, given=torch.where(MASK, x, NAN)))


def exact_mean(x, mask):
    return math.fsum(x.double()[mask].tolist()) / int(mask.sum())


def test_mean_over_the_mask(check):
    x = numbers(4, 5)
    check("masked_mean", lambda f: error(f(x, MASK), exact_mean(x, MASK)), 1e-6)


def test_mean_over_a_mask_with_holes(check):
    x = numbers(4, 5)
    check("masked_mean", lambda f: error(f(x, HOLES), exact_mean(x, HOLES)), 1e-6)


def test_mean_with_nan_outside_the_mask(check):
    x = numbers(4, 5)
    check("masked_mean", lambda f: error(f(torch.where(MASK, x, NAN), MASK), exact_mean(x, MASK)), 1e-6)


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


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_of_the_kl(check, estimator):
    """With x = log π − log π_ref, the derivative to log π is 1, x, 1 − e^−x."""
    ref = numbers(4, 5, seed=1) - 2.0

    def found(f):
        logp = (numbers(4, 5) - 2.0).requires_grad_()
        x = logp.detach().double() - ref.double()
        slopes = {"k1": torch.ones_like(x), "k2": x, "k3": 1 - (-x).exp()}[estimator]
        return gradient_error(f(logp, ref, estimator).sum(), logp, slopes)

    check("kl", found, 2e-6, constant(lambda f: f((numbers(4, 5) - 2.0).requires_grad_(), ref, estimator)))


def loss_error(inputs, mask, clip_range, exact, filling=None):
    """Return how far a loss and its gradient to its first input are off, with ``filling`` outside the mask."""

    def found(f):
        live, *constants = (x.clone() if filling is None else torch.where(mask, x, filling) for x in inputs)
        loss = f(live.requires_grad_(), *constants, mask, clip_range)
        value, slopes = exact(*inputs, mask, clip_range)
        return max(error(loss.detach(), value), gradient_error(loss, live, slopes))

    return found


def policy_inputs():
    return numbers(4, 5, scale=0.5) - 2, numbers(4, 5, seed=1, scale=0.5) - 2, numbers(4, 5, seed=2)


def value_inputs():
    return tuple(numbers(4, 5, seed=seed) for seed in range(3))


@ranges
def test_clipped_policy_loss_and_its_gradient(check, clip_range):
    check("policy_loss", loss_error(policy_inputs(), MASK, clip_range, exact_policy_loss), 2e-6)


def test_policy_loss_over_a_mask_with_holes(check):
    check("policy_loss", loss_error(policy_inputs(), HOLES, 0.2, exact_policy_loss), 2e-6)


@rubbish
def test_policy_loss_with_rubbish_outside_the_mask(check, filling):
    check("policy_loss", loss_error(policy_inputs(), MASK, 0.2, exact_policy_loss, filling), 2e-6)


@ranges
def test_clipped_value_loss_and_its_gradient(check, clip_range):
    check("value_loss", loss_error(value_inputs(), MASK, clip_range, exact_value_loss), 2e-6)


def test_value_loss_over_a_mask_with_holes(check):
    check("value_loss", loss_error(value_inputs(), HOLES, 0.2, exact_value_loss), 2e-6)


@rubbish
def test_value_loss_with_rubbish_outside_the_mask(check, filling):
    check("value_loss", loss_error(value_inputs(), MASK, 0.2, exact_value_loss, filling), 2e-6)
