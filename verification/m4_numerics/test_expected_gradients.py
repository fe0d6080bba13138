"""The expectation of each estimator, over every response that there is, against the exact gradient of its objective.

The gradients come from the trainer's own scoring, targets and ``accumulate_gradients``; the expectation is a sum over
the world weighted by probability. Tolerance: 1e-10, absolute, of gradients around 1.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from rlhf_core.advantages import token_rewards
from rlhf_core.config import PPOConfig, SamplingConfig, TrainConfig
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.profiling import StageClock
from rlhf_core.rollout import Rollout
from rlhf_core.scoring import Scores, score_rollout
from rlhf_core.targets import Targets, make_targets
from rlhf_core.testing.tabular import TabularPolicy
from rlhf_core.testing.world import (
    World,
    double_precision,
    expectation,
    gradient,
    kl,
    objective,
    sequence_logprobs,
    token_distributions,
    token_logprobs,
)
from rlhf_core.testing.world_models import ARCHITECTURES, tiny_transformer
from rlhf_core.trainer_state import new_state
from rlhf_core.updates import accumulate_gradients

pytestmark = pytest.mark.m4
WORLD = World(vocabulary=3, length=3, prompts=((2,), (1, 2)))
PAIRS = World(vocabulary=3, length=2, prompts=((2,),))
BETA = 0.3
PLAIN = {
    "value_coef": 0.0,
    "gamma": 1.0,
    "lam": 1.0,
    "whiten_advantages": False,
    "missing_eos_penalty": 0.0,
    "kl_coef": BETA,
}
Gradient = dict[str, torch.Tensor]
kinds = pytest.mark.parametrize("kind", ["tabular", *ARCHITECTURES])


@pytest.fixture(autouse=True)
def _double():
    with double_precision():
        yield


def model(kind: str, world: World, seed: int):
    return TabularPolicy(world, seed=seed) if kind == "tabular" else tiny_transformer(world, kind, seed=seed)


class Trainer:
    """The trainer's parts over a whole world: one row for each response."""

    def __init__(self, kind: str, world: World, *, prompt: int = 0, temperature: float = 1.0, **settings: Any) -> None:
        self.world, self.prompt, self.temperature = world, prompt, temperature
        n = settings.get("group_size") or 1
        self.config = TrainConfig(
            seed=0,
            sampling=SamplingConfig(max_new_tokens=world.length, temperature=temperature),
            ppo=PPOConfig(**{**PLAIN, "batch_size": n, "minibatch_size": n, "micro_batch_size": n, **settings}),
        )
        value = "shared" if self.config.ppo.recipe.has_value_model else None
        self.lm = model(kind, world, seed=1)
        self.reference = Reference(model(kind, world, seed=2))
        self.state = new_state(ActorCritic(self.lm, value), self.reference, self.config)
        self.rollout = world.rollout(prompt)
        every_row = [[torch.arange(len(world.responses))]]
        self.scores = score_rollout(
            self.state.model, self.reference, self.rollout, every_row, temperature, self.config.dtype
        )
        generator = torch.Generator().manual_seed(3)
        self.rewards_N = torch.randn(len(world.responses), generator=generator)

    def logp(self, lm: torch.nn.Module | None = None) -> torch.Tensor:
        return sequence_logprobs(self.world, lm or self.lm, self.prompt, temperature=self.temperature)

    @property
    def ref_logp(self) -> torch.Tensor:
        return self.logp(self.reference.lm).detach()

    def targets(self, rows: torch.Tensor) -> Targets:
        recipe = self.config.ppo.recipe
        rewards_BT = token_rewards(
            self.rewards_N[rows],
            self.scores.logprobs_BT[rows],
            self.scores.ref_logprobs_BT[rows],
            self.rollout.response_mask_BT[rows],
            kl_coef=self.state.kl_coef if recipe.kl_place == "reward" else 0.0,
            estimator=recipe.kl_estimator if recipe.kl_place == "reward" else "k1",
        )
        values_BT = None if self.scores.values_BT is None else self.scores.values_BT[rows]
        return make_targets(rewards_BT, values_BT, self.rollout.response_mask_BT[rows], self.config.ppo)[0]

    def gradient(self, rows: torch.Tensor, targets: Targets) -> tuple[Gradient, int]:
        """Return minus the loss's gradient on a minibatch of these rows, and what the loss was divided by."""
        parameters = dict(self.lm.named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        everything = [torch.arange(len(rows))]
        part = accumulate_gradients(
            self.state,
            taken(self.rollout, rows),
            taken(self.scores, rows),
            targets,
            everything,
            self.config,
            StageClock(),
        )
        return {name: torch.zeros_like(p) if p.grad is None else -p.grad for name, p in parameters.items()}, part.count

    def expected(self, k: int = 1, *, undo_count: bool = False) -> Gradient:
        """Return Σ p(y_1) … p(y_k) × gradient over all groups of k responses; ``undo_count`` takes out the divisor."""
        p_N = self.logp().exp().detach()
        total: Gradient = {name: torch.zeros_like(parameter) for name, parameter in self.lm.named_parameters()}
        for group in itertools.product(range(len(p_N)), repeat=k):
            rows = torch.tensor(group)
            grads, count = self.gradient(rows, self.targets(rows))
            weight = float(p_N[rows].prod()) * (count if undo_count else 1)
            for name in total:
                total[name] += weight * grads[name]
        return total


def taken(whole: Rollout | Scores, rows: torch.Tensor):
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    return dataclasses.replace(whole, **{name: None if x is None else x[rows] for name, x in fields.items()})


def distance(a: Gradient, b: Gradient) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def assert_equal(found: Gradient, exact: Gradient) -> None:
    assert max(float(grad.abs().max()) for grad in exact.values()) > 1e-3  # zeros would prove nothing
    assert distance(found, exact) < 1e-10


def scaled(grads: Gradient, factor: float) -> Gradient:
    return {name: factor * grad for name, grad in grads.items()}


def policy_gradient(trainer: Trainer, beta: float = BETA) -> Gradient:
    value = objective(trainer.logp(), trainer.ref_logp, trainer.rewards_N, beta=beta)
    return gradient(value, trainer.lm)


# -- PPO's first step and its baseline ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppos_first_step_is_the_gradient_of_reward_minus_beta_kl(kind, prompt, temperature):
    trainer = Trainer(kind, WORLD, prompt=prompt, temperature=temperature)
    assert_equal(trainer.expected(undo_count=True), policy_gradient(trainer))


@pytest.mark.parametrize("kind", ["tabular", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_lambda_1_no_value_function_biases_gae(kind, seed):
    trainer = Trainer(kind, WORLD)
    values_of = {(): 0.0}
    generator = torch.Generator().manual_seed(seed)
    values_of |= {prefix: float(10 * torch.randn((), generator=generator)) for prefix in WORLD.prefixes}
    trainer.scores = with_values(trainer, values_of)
    assert_equal(trainer.expected(undo_count=True), policy_gradient(trainer))


def with_values(trainer: Trainer, values_of: dict) -> Scores:
    values_BT = torch.full(trainer.rollout.response_mask_BT.shape, 1e6)
    for row, response in enumerate(trainer.world.responses):
        for t in range(len(response)):
            values_BT[row, t] = values_of[response[:t]]
    return dataclasses.replace(trainer.scores, values_BT=values_BT)


def exact_values(trainer: Trainer) -> dict:
    """V(prefix) = E[Σ_{l ≥ t} r_l | prefix], the KL penalty of every later token included."""
    world, p_N = trainer.world, trainer.logp().exp().detach()
    log_ratio_NT = token_logprobs(world, trainer.lm, trainer.prompt) - token_logprobs(
        world, trainer.reference.lm, trainer.prompt
    )
    values = {}
    for prefix in world.prefixes:
        t = len(prefix)
        rows = [row for row, response in enumerate(world.responses) if response[:t] == prefix and len(response) > t]
        to_go = trainer.rewards_N[rows] - BETA * log_ratio_NT[rows, t:].sum(dim=1).detach()
        values[prefix] = float((p_N[rows] * to_go).sum() / p_N[rows].sum())
    return values


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_with_the_exact_values_no_lambda_biases_gae(lam):
    trainer = Trainer("tabular", WORLD, lam=lam)
    trainer.scores = with_values(trainer, exact_values(trainer))
    assert_equal(trainer.expected(undo_count=True), policy_gradient(trainer))


def test_with_other_values_a_lambda_below_1_does_bias_gae():
    trainer = Trainer("tabular", WORLD, lam=0.5)
    trainer.scores = with_values(trainer, {prefix: 3.0 * len(prefix) for prefix in WORLD.prefixes})
    assert distance(trainer.expected(undo_count=True), policy_gradient(trainer)) > 0.1


@kinds
def test_reinforce_with_reward_to_go_is_the_policy_gradient(kind):
    trainer = Trainer(kind, WORLD, algorithm="reinforce++")
    assert_equal(trainer.expected(undo_count=True), policy_gradient(trainer))


# -- group baselines ---------------------------------------------------------------------------------------------------


@kinds
def test_rloo_is_the_policy_gradient(kind):
    trainer = Trainer(kind, PAIRS, algorithm="rloo", group_size=2)
    assert_equal(trainer.expected(k=2), policy_gradient(trainer))


def test_rloo_of_three_is_the_policy_gradient():
    trainer = Trainer("tabular", PAIRS, algorithm="rloo", group_size=3)
    assert_equal(trainer.expected(k=3), policy_gradient(trainer))


@pytest.mark.parametrize("k", [2, 3])
def test_dr_grpo_is_the_policy_gradient_times_k_minus_1_over_k_and_over_the_longest_response(k):
    trainer = Trainer("tabular", PAIRS, algorithm="dr-grpo", group_size=k, kl_coef=0.0)
    assert_equal(trainer.expected(k=k), scaled(policy_gradient(trainer, beta=0.0), (k - 1) / k / PAIRS.length))


def grpo_theory(trainer: Trainer, *, by_length: bool) -> Gradient:
    """Of two responses A = ±d/2 / (d/√2 + 1e-6), d = |r − r'|: but for 1e-6 that is sign(r − r')/√2.

    It is the order of the pair and not its distance. So E[A | y] = Σ_y' p(y') A(r(y), r(y')), times 1/|y| where the
    loss takes the mean of each response.
    """
    r_N, p_N = trainer.rewards_N, trainer.logp().exp().detach()
    difference_NN = r_N[:, None] - r_N[None, :]
    advantage_N = (difference_NN / 2 / (difference_NN.abs() / 2**0.5 + 1e-6)) @ p_N
    lengths_N = torch.tensor([float(len(response)) for response in trainer.world.responses])
    weights_N = p_N * advantage_N / (lengths_N if by_length else 1.0)
    return gradient((weights_N * trainer.logp()).sum(), trainer.lm)


@kinds
@pytest.mark.parametrize("loss_mean", ["sequence", "sum"])
def test_grpos_bias_is_what_theory_says(kind, loss_mean):
    trainer = Trainer(kind, PAIRS, algorithm="grpo", group_size=2, kl_coef=0.0, loss_mean=loss_mean)
    found = trainer.expected(k=2)
    assert_equal(found, grpo_theory(trainer, by_length=loss_mean == "sequence"))
    exact = policy_gradient(trainer, beta=0.0)
    a, b = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (found, exact))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) < 0.9999  # no rescaling makes it the gradient


def test_grpo_does_not_see_how_large_rewards_are_and_the_gradient_does():
    found = []
    for factor in (1.0, 100.0):
        trainer = Trainer("tabular", PAIRS, algorithm="grpo", group_size=2, kl_coef=0.0)
        trainer.rewards_N = factor * trainer.rewards_N
        found.append(trainer.expected(k=2))
    assert distance(*found) < 1e-4


# -- KL penalties ------------------------------------------------------------------------------------------------------


def state_held_kl(trainer: Trainer, *, forwards: bool) -> Gradient:
    """Σ_s d(s) ∇ KL(π_s‖ref_s), or ∇ KL(ref_s‖π_s) where not ``forwards``: how often a prefix is met is held fixed."""
    world = trainer.world
    logp, logq = (
        token_distributions(world, lm, trainer.prompt, temperature=trainer.temperature)
        for lm in (trainer.lm, trainer.reference.lm)
    )
    p, q = logp, logq.detach()
    kl_NT = (p.exp() * (p - q)).sum(-1) if forwards else (q.exp() * (q - p)).sum(-1)
    kl_N = torch.where(trainer.rollout.response_mask_BT, kl_NT, 0.0).sum(dim=1)
    return gradient(expectation(trainer.logp().detach(), kl_N), trainer.lm)


def whole_kl(trainer: Trainer) -> Gradient:
    return gradient(kl(trainer.logp(), trainer.ref_logp), trainer.lm)


def minus(a: Gradient, b: Gradient) -> Gradient:
    return {name: a[name] - b[name] for name in a}


def penalty(kind: str, world: World, **settings: Any) -> Trainer:
    """A trainer whose loss is the KL penalty alone."""
    trainer = Trainer(kind, world, algorithm="reinforce++", loss_mean="sum", kl_coef=1.0, **settings)
    trainer.rewards_N = torch.zeros_like(trainer.rewards_N)
    return trainer


@kinds
def test_k1_in_the_reward_has_the_gradient_of_the_kl_of_sequences(kind):
    trainer = penalty(kind, WORLD, kl_place="reward", kl_estimator="k1")
    assert_equal(scaled(trainer.expected(), -1.0), whole_kl(trainer))


@kinds
def test_k3_in_the_reward_lacks_the_gradient_of_the_kl_the_other_way(kind):
    """E[k3 ∇ log π] = ∇ E[k3] − E[∇ k3] = ∇ KL(π‖ref) − Σ d(s) ∇ KL(ref_s‖π_s)."""
    trainer = penalty(kind, WORLD, kl_place="reward", kl_estimator="k3")
    found = scaled(trainer.expected(), -1.0)
    assert_equal(found, minus(whole_kl(trainer), state_held_kl(trainer, forwards=False)))
    assert distance(found, whole_kl(trainer)) > 1e-2


@kinds
def test_k2_in_the_reward_has_the_gradient_of_its_own_expectation_less_that_of_k2_itself(kind):
    """E[k2 ∇ log π] = ∇ E[k2] − E[∇ k2], and E[∇ k2] = Σ d(s) ∇ KL(π_s‖ref_s)."""
    trainer = penalty(kind, WORLD, kl_place="reward", kl_estimator="k2")
    token_logp, token_ref = (token_logprobs(WORLD, lm, 0) for lm in (trainer.lm, trainer.reference.lm))
    mean_k2 = expectation(trainer.logp(), ((token_logp - token_ref.detach()) ** 2 / 2).sum(dim=1))
    theory = minus(gradient(mean_k2, trainer.lm), state_held_kl(trainer, forwards=True))
    assert_equal(scaled(trainer.expected(), -1.0), theory)
    assert distance(theory, whole_kl(trainer)) > 1e-2


@kinds
@pytest.mark.parametrize("estimator", ["k2", "k3-weighted"])
def test_k2_and_weighted_k3_in_the_loss_have_the_gradient_of_each_tokens_kl(kind, estimator):
    trainer = penalty(kind, WORLD, kl_place="loss", kl_estimator=estimator)
    found = scaled(trainer.expected(), -1.0)
    assert_equal(found, state_held_kl(trainer, forwards=True))
    # A penalty of the loss does not see that an earlier token leads to prefixes where the policies differ more.
    assert distance(found, whole_kl(trainer)) > 1e-2


@kinds
def test_k3_in_the_loss_has_the_gradient_of_each_tokens_kl_the_other_way(kind):
    trainer = penalty(kind, WORLD, kl_place="loss", kl_estimator="k3")
    assert_equal(scaled(trainer.expected(), -1.0), state_held_kl(trainer, forwards=False))
    assert distance(state_held_kl(trainer, forwards=False), state_held_kl(trainer, forwards=True)) > 1e-2


@pytest.mark.parametrize(("estimator", "right"), [("k2", True), ("k3-weighted", True), ("k3", False)])
def test_of_a_single_token_the_kl_of_the_loss_is_the_kl_of_the_sequence(estimator, right):
    trainer = penalty("gpt2", World(vocabulary=8, length=1, prompts=((2,),)), kl_place="loss", kl_estimator=estimator)
    away = distance(scaled(trainer.expected(), -1.0), whole_kl(trainer))
    assert away < 1e-10 if right else away > 1e-2


@kinds
def test_k1_in_the_loss_pulls_nowhere_and_is_refused(kind):
    trainer = Trainer(kind, WORLD)
    log_ratio_N = trainer.logp() - trainer.ref_logp
    grads = gradient(expectation(trainer.logp().detach(), log_ratio_N), trainer.lm)
    assert max(float(grad.abs().max()) for grad in grads.values()) < 1e-13
    with pytest.raises(ValueError, match="whose expectation is zero"):
        Trainer(kind, WORLD, kl_place="loss", kl_estimator="k1")


@pytest.mark.parametrize(("estimator", "right"), [("k3-weighted", True), ("k2", False), ("k3", False)])
def test_off_policy_only_the_weighted_k3_keeps_its_gradient(estimator, right):
    """Responses drawn by an older policy: Σ d_old(s) ∇ KL(π_s‖ref_s), as ρ puts the token, not the prefix, right."""
    trainer = penalty("tabular", WORLD, kl_place="loss", kl_estimator=estimator)
    old = TabularPolicy(WORLD, (trainer.lm.table + 0.5 * TabularPolicy(WORLD, seed=9).table).detach())
    old_logp_NT = token_logprobs(WORLD, old, 0).detach()
    trainer.scores = dataclasses.replace(trainer.scores, logprobs_BT=old_logp_NT)
    p_N = old_logp_NT.sum(dim=1).exp()
    found = torch.zeros_like(trainer.lm.table)
    for row in range(len(p_N)):
        rows = torch.tensor([row])
        zeros = torch.zeros(1, WORLD.length)
        found -= p_N[row] * trainer.gradient(rows, Targets(zeros, None))[0]["table"]
    logp, logq = (token_distributions(WORLD, lm, 0) for lm in (trainer.lm, trainer.reference.lm))
    kl_NT = torch.where(trainer.rollout.response_mask_BT, (logp.exp() * (logp - logq.detach())).sum(-1), 0.0)
    exact = gradient((p_N * kl_NT.sum(dim=1)).sum(), trainer.lm)["table"]
    away = float((found - exact).abs().max())
    assert away < 1e-10 if right else away > 1e-2
