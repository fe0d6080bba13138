"""KL and entropy: what the trainer estimates, in the mean and in its spread, against exact sums and closed forms."""

import math

import numpy as np
import pytest
import torch

from rlhf_core.advantages import kl_penalties
from rlhf_core.losses import kl_k2, kl_k3, kl_k3_weighted
from rlhf_core.metrics import rollout_metrics
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.scoring import score_rollout
from rlhf_core.testing.tabular import TabularPolicy
from rlhf_core.testing.world import (
    World,
    double_precision,
    entropy,
    expectation,
    kl,
    sequence_logprobs,
    token_distributions,
)
from rlhf_core.testing.world_models import ARCHITECTURES, tiny_transformer

pytestmark = pytest.mark.m4
WORLD = World(vocabulary=4, length=3, prompts=((2,), (3, 2)))
kinds = pytest.mark.parametrize("kind", ["tabular", *ARCHITECTURES])


@pytest.fixture(autouse=True)
def _double():
    with double_precision():
        yield


def models(kind):
    make = (lambda seed: TabularPolicy(WORLD, seed=seed)) if kind == "tabular" else None
    make = make or (lambda seed: tiny_transformer(WORLD, kind, seed=seed))
    return make(1), make(2)


def scored(kind, prompt):
    lm, ref = models(kind)
    rollout = WORLD.rollout(prompt)
    every_row = [[torch.arange(len(WORLD.responses))]]
    scores = score_rollout(ActorCritic(lm, None), Reference(ref), rollout, every_row, 1.0, "float32")
    with torch.no_grad():
        logp, ref_logp = (sequence_logprobs(WORLD, one, prompt) for one in (lm, ref))
    return lm, ref, rollout, scores, logp, ref_logp


def metrics_of(rollout, scores, rows):
    def array(tensor):
        return tensor[rows].numpy()

    n = len(rows)
    return rollout_metrics(
        rewards=np.zeros(n), scores=np.zeros(n), ended=array(rollout.ended_B), mask=array(rollout.response_mask_BT),
        logprobs=array(scores.logprobs_BT), ref_logprobs=array(scores.ref_logprobs_BT),
        sampler_logprobs=array(scores.logprobs_BT), entropies=array(scores.entropies_BT), values=None,
        advantages=np.zeros((n, WORLD.length)), returns=None, group_size=1, kl_coef=0.0, kl_target=1.0,
    )  # fmt: skip


@kinds
@pytest.mark.parametrize("prompt", [0, 1])
def test_the_logged_kl_has_the_exact_kl_as_its_mean(kind, prompt):
    _, _, rollout, scores, logp, ref_logp = scored(kind, prompt)
    logged = torch.tensor([metrics_of(rollout, scores, [row])["kl"] for row in range(len(logp))])
    exact = float(kl(logp, ref_logp))
    assert exact > 0.1
    assert float(expectation(logp, logged)) == pytest.approx(exact, abs=1e-12)
    # and of its spread: one response's k1 is the log ratio of the two policies
    second = float(expectation(logp, (logged - exact) ** 2))
    assert second == pytest.approx(float(expectation(logp, (logp - ref_logp - exact) ** 2)), rel=1e-10)


@kinds
def test_the_token_entropies_of_a_response_add_up_to_the_entropy_of_responses(kind):
    _, _, rollout, scores, logp, _ = scored(kind, 1)
    sums = torch.where(rollout.response_mask_BT, scores.entropies_BT, 0.0).sum(dim=1)
    assert float(expectation(logp, sums)) == pytest.approx(float(entropy(logp)), abs=1e-12)


@kinds
def test_the_logged_entropy_is_the_mean_over_response_tokens(kind):
    lm, _, rollout, scores, *_ = scored(kind, 0)
    rows = [0, 3, 20, 39]
    exact = []
    with torch.no_grad():
        logp_NTV = token_distributions(WORLD, lm, 0)
    for row in rows:
        for t in range(len(WORLD.responses[row])):
            exact.append(-math.fsum((logp_NTV[row, t].exp() * logp_NTV[row, t]).tolist()))
    assert metrics_of(rollout, scores, rows)["entropy"] == pytest.approx(math.fsum(exact) / len(exact), abs=1e-12)


@kinds
def test_the_estimators_of_a_tokens_kl_have_the_means_and_spreads_that_summing_over_tokens_gives(kind):
    """Given the prefix, over the token: E k1 = E k3 = KL, E k2 = ½ E x², and k3 is never negative."""
    lm, ref, *_ = scored(kind, 0)
    with torch.no_grad():
        logp_NTV, logq_NTV = (token_distributions(WORLD, one, 0) for one in (lm, ref))
    for row, response in enumerate(WORLD.responses):
        for t in range(len(response)):
            logp, logq = logp_NTV[row, t], logq_NTV[row, t]
            p, x = logp.exp(), logp - logq
            exact = math.fsum((p * x).tolist())
            k1, k2, k3 = (kl_penalties(logp, logq, name) for name in ("k1", "k2", "k3"))
            assert float((p * k1).sum()) == pytest.approx(exact, abs=1e-12)
            assert float((p * k3).sum()) == pytest.approx(exact, abs=1e-12)
            assert float((p * k2).sum()) == pytest.approx(math.fsum((p * x * x / 2).tolist()), abs=1e-12)
            assert float(k3.min()) >= 0.0
            spreads = [float((p * (k - (p * k).sum()) ** 2).sum()) for k in (k1, k2, k3)]
            explicit = [
                math.fsum((p * x**2).tolist()) - exact**2,
                math.fsum((p * x**4 / 4).tolist()) - math.fsum((p * x * x / 2).tolist()) ** 2,
                math.fsum((p * (logq.exp() / p - 1 + x) ** 2).tolist()) - exact**2,
            ]
            assert spreads == pytest.approx(explicit, abs=1e-10)


@kinds
def test_the_weighted_k3_is_unbiased_under_another_policy_too(kind):
    lm, ref = models(kind)
    with torch.no_grad():
        logp, logq, log_old = (
            token_distributions(WORLD, one, 0)[0, 0] for one in (lm, ref, TabularPolicy(WORLD, seed=7))
        )
    exact = float((logp.exp() * (logp - logq)).sum())
    weighted = log_old.exp() * kl_k3_weighted(logp - logq, logp - log_old)
    assert float(weighted.sum()) == pytest.approx(exact, abs=1e-12)
    plain = log_old.exp() * kl_k3(logp - logq)
    assert abs(float(plain.sum()) - exact) > 1e-3


# -- the Gaussian figures ----------------------------------------------------------------------------------------------


def gaussian(mu, estimator):
    """Mean and deviation, both relative to the KL, of an estimator of KL(N(0,1)‖N(μ,1)) = μ²/2, by quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = torch.from_numpy(weights / weights.sum())
    logq, logp = torch.from_numpy(-(x**2) / 2), torch.from_numpy(-((x - mu) ** 2) / 2)
    k = estimator(logq, logp)
    mean = float((weights * k).sum())
    deviation = math.sqrt(float((weights * (k - mean) ** 2).sum()))
    return mean / (mu**2 / 2), deviation / (mu**2 / 2)


ESTIMATORS = {
    "reward": {name: lambda q, p, name=name: kl_penalties(q, p, name) for name in ("k1", "k2", "k3")},
    "loss": {"k2": lambda q, p: kl_k2(q - p), "k3": lambda q, p: kl_k3(q - p)},
}


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0])
def test_the_estimators_have_the_bias_and_deviation_of_the_gaussian(place, mu):
    theory = {
        "k1": (0.0, 2 / mu),
        "k2": (mu**2 / 4, math.sqrt(2 + mu**2)),
        "k3": (0.0, math.sqrt(math.exp(mu**2) - 1 - mu**2) / (mu**2 / 2)),
    }
    for name, estimator in ESTIMATORS[place].items():
        mean, deviation = gaussian(mu, estimator)
        bias, spread = theory[name]
        assert mean - 1.0 == pytest.approx(bias, abs=1e-10)
        assert deviation == pytest.approx(spread, rel=1e-9)


def test_at_a_small_distance_the_published_figures_come_out():
    """Schulman (2020): μ = 0.1 gives k1 a deviation of 20 and k2 a bias of 0.002 and a deviation of 1.42."""
    assert gaussian(0.1, ESTIMATORS["reward"]["k1"]) == pytest.approx((1.0, 20.0), abs=1e-8)
    assert gaussian(0.1, ESTIMATORS["reward"]["k2"]) == pytest.approx((1.0025, 1.4177), abs=1e-4)
    assert gaussian(0.1, ESTIMATORS["reward"]["k3"]) == pytest.approx((1.0, 1.4166), abs=1e-4)


def test_the_tests_would_notice_a_wrong_estimator():
    mean, _ = gaussian(1.0, lambda q, p: kl_penalties(p, q, "k3"))
    assert abs(mean - 1.0) > 0.1
