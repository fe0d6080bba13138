"""Training to the end in the enumerated world: the real loop, the real sampler, AdamW, and a table for a policy."""

from typing import Any

import torch

from rlhf_core.config import PPOConfig, SamplingConfig, TrainConfig
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.ppo import train
from rlhf_core.rollout import Rollout
from rlhf_core.testing.tabular import TabularPolicy, tabular_states
from rlhf_core.testing.world import (
    World,
    double_precision,
    kl,
    optimum,
    sequence_logprobs,
    token_distributions,
)
from rlhf_core.trainer_state import new_state

BETA = 0.5
STRONG = 4.0
"""A KL coefficient under which GRPO, whose advantages have deviation 1 however small the rewards, stays inside."""
WORLD = World(vocabulary=4, length=3, prompts=((2,), (3, 2)))
SETTINGS: dict[str, Any] = {
    "steps": 300,
    "batch_size": 256,
    "minibatch_size": 256,
    "micro_batch_size": 256,
    "epochs": 2,
    "learning_rate": 0.05,
    "max_grad_norm": 1e6,
    "gamma": 1.0,
    "lam": 1.0,
    "value_clip_range": 1e6,
    "value_coef": 1.0,
    "whiten_advantages": False,
    "kl_coef": BETA,
    "kl_control": "fixed",
    "missing_eos_penalty": 0.0,
}
"""Everything that would move the optimum or only slow the way to it is off: whitening, penalties, λ below 1."""


def rewards(world: World, prompt: int) -> torch.Tensor:
    """Return [N] the task's reward of each response, between −1 and 1."""
    generator = torch.Generator().manual_seed(100 + prompt)
    return 2.0 * torch.rand(len(world.responses), generator=generator, dtype=torch.float64) - 1.0


def values_behind_the_end(world: World) -> torch.Tensor:
    """Return [1, S] numbers that a network's value head may well give where nothing is to be valued."""
    live = {(*prompt, *prefix) for prompt in world.prompts for prefix in world.prefixes}
    states = tabular_states(world)
    return torch.tensor([[0.0 if state in live else (row % 5) - 1.5 for row, state in enumerate(states)]])


def run(
    algorithm: str = "ppo",
    *,
    world: World = WORLD,
    initial_seed: int | None = None,
    temperature: float = 1.0,
    **settings: Any,
) -> tuple[TabularPolicy, TabularPolicy]:
    """Train from the reference, or from another table, and return policy and reference."""
    config = TrainConfig(
        seed=0,
        sampling=SamplingConfig(max_new_tokens=world.length, temperature=temperature),
        ppo=PPOConfig(algorithm=algorithm, **(SETTINGS | settings)),  # type: ignore[arg-type]
    )
    table_of = {
        (*tokens, *response): score
        for prompt, tokens in enumerate(world.prompts)
        for response, score in zip(world.responses, rewards(world, prompt).tolist(), strict=True)
    }

    def reward(rollout: Rollout) -> torch.Tensor:
        return torch.tensor([table_of[tuple(tokens)] for tokens in rollout.token_ids()])

    with double_precision():
        reference = TabularPolicy(world, seed=1)
        policy = TabularPolicy(world, seed=1 if initial_seed is None else initial_seed)
        model = ActorCritic(policy, "shared" if config.ppo.recipe.has_value_model else None)
        if model.value_head is not None:
            with torch.no_grad():
                model.value_head.weight += values_behind_the_end(world)
        state = new_state(model, Reference(reference), config)
        prompts = [list(world.prompts[i % len(world.prompts)]) for i in range(config.ppo.prompts_per_step)]
        for _ in train(state, lambda step: prompts, reward, config, eos_id=world.eos_id, pad_id=world.pad_id):
            pass
    return policy, reference


@torch.no_grad()
def distances(policy: TabularPolicy, goals: list[torch.Tensor], *, temperature: float = 1.0) -> list[float]:
    """Return KL(π‖goal) of each prompt."""
    return [
        float(kl(sequence_logprobs(policy.world, policy, prompt, temperature=temperature), goal_N))
        for prompt, goal_N in enumerate(goals)
    ]


@torch.no_grad()
def best_policies(world: World, reference: TabularPolicy, *, temperature: float = 1.0) -> list[torch.Tensor]:
    """Return [N] log π* ∝ π_ref exp(r/β) of each prompt."""
    return [
        optimum(sequence_logprobs(world, reference, prompt, temperature=temperature), rewards(world, prompt), beta=BETA)
        for prompt in range(len(world.prompts))
    ]


@torch.no_grad()
def token_kl_policy(world: World, prompt: int, reference: TabularPolicy, *, k: int = 8) -> torch.Tensor:
    """Return [N] log π of where a KL penalty in the loss leads, by induction from the last token to the first.

    A penalty of the loss pulls at each token alone, Σ d(s) ∇ KL(π_s‖ref_s) with the prefixes' frequencies held, and so
    it does not charge a token for the KL of the tokens that it leads to: π(a|s) ∝ π_ref(a|s) exp(Q(s, a)/β), where Q is
    the reward to come under π, without its KL. A group of k that is compared with its own mean makes the reward's part
    (k − 1)/k as large, and leaves the penalty's.
    """
    logq_NTV = token_distributions(world, reference, prompt)
    of_prefix = {
        response[:t]: logq_NTV[row, t] for row, response in enumerate(world.responses) for t in range(len(response))
    }
    r_of = dict(zip(world.responses, rewards(world, prompt).tolist(), strict=True))
    value: dict[tuple[int, ...], float] = dict(r_of)
    logp_of = {}
    for prefix in sorted(world.prefixes, key=len, reverse=True):
        q_V = torch.tensor([value[(*prefix, token)] for token in range(world.vocabulary)], dtype=torch.float64)
        logp_of[prefix] = torch.log_softmax(of_prefix[prefix] + (k - 1) / k * q_V / BETA, dim=0)
        value[prefix] = float(logp_of[prefix].exp() @ q_V)
    return torch.stack(
        [
            torch.stack([logp_of[response[:t]][token] for t, token in enumerate(response)]).sum()
            for response in world.responses
        ]
    )


@torch.no_grad()
def standard_score_policy(world: World, prompt: int, reference: TabularPolicy) -> torch.Tensor:
    """Return [N] log π of where GRPO with k3 in the loss leads in a world of single tokens, for a large group.

    Σ_a π(a) (r(a) − r̄)/σ ∇ log π(a) = β ∇ KL(ref‖π) holds when π(a) (r(a) − r̄)/σ = β (π(a) − ref(a)) for every a, so
    π(a) = ref(a) / (1 − (r(a) − r̄)/(σ β)), r̄ and σ being π's own: solved by iteration, which needs a β that is large.
    """
    logq_N, r_N = sequence_logprobs(world, reference, prompt), rewards(world, prompt)
    p_N = logq_N.exp()
    for _ in range(10_000):
        mean = (p_N * r_N).sum()
        sigma = ((p_N * (r_N - mean) ** 2).sum()).sqrt()
        new_N = logq_N.exp() / (1.0 - (r_N - mean) / (sigma * STRONG))
        p_N = 0.5 * p_N + 0.5 * new_N / new_N.sum()
    return p_N.log()
