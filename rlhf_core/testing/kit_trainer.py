"""The project's own trainer as a trainer under test: ``rlhf_core.ppo.train``, whole, on a tabular policy.

Two things are put in place of its own. The optimizer is plain gradient descent. The uniforms from which the sampler
draws are chosen so that it draws the responses of the case: the sampler itself runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from rlhf_core import ppo
from rlhf_core.config import PPOConfig, SamplingConfig, TrainConfig
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.rollout import Rollout
from rlhf_core.testing.case import Case, Outcome
from rlhf_core.testing.tabular import TabularPolicy
from rlhf_core.testing.world import Tokens, World, double_precision
from rlhf_core.trainer_state import new_state


def kit_trainer(case: Case) -> Outcome:
    """Take a case's steps with ``rlhf_core.ppo.train``."""
    world = case.world
    config = TrainConfig(
        seed=0,
        sampling=SamplingConfig(max_new_tokens=world.length, temperature=case.temperature),
        ppo=PPOConfig(**case.ppo),
    )
    score_of = {
        (*world.prompts[prompt], *response): score
        for prompt, response, score in zip(case.prompts, case.responses, case.scores, strict=True)
    }

    def reward(rollout: Rollout) -> Tensor:
        return torch.tensor([score_of[tuple(tokens)] for tokens in rollout.token_ids()])

    with double_precision():
        recipe = config.ppo.recipe
        policy = case.policy()
        model = ActorCritic(policy, "shared" if recipe.has_value_model else None)
        if model.value_head is not None:
            with torch.no_grad():
                model.value_head.weight.copy_(case.values_S[None])
            model.value_head.bias.requires_grad_(False)  # a value for each prefix, and nothing that they share
        reference_table = case.reference()
        reference = Reference(reference_table)
        state = new_state(model, reference, config)
        state.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        metrics: dict[str, float] = {}
        with draws(world, policy, case.prompts, case.responses, case.temperature):
            steps = ppo.train(
                state,
                lambda step: [list(world.prompts[prompt]) for prompt in case.prompts[:: recipe.group_size]],
                reward,
                config,
                eos_id=world.eos_id,
                pad_id=world.pad_id,
            )
            for result in steps:
                metrics = result.metrics
    return Outcome(
        policy_SV=policy.table.detach(),
        values_S=case.values_S if model.value_head is None else model.value_head.weight.detach()[0],
        reference_SV=reference_table.table.detach(),
        kl_coef=state.kl_coef,
        metrics=metrics,
    )


@contextmanager
def draws(
    world: World,
    lm: TabularPolicy,
    prompts: tuple[int, ...],
    responses: tuple[Tokens, ...],
    temperature: float,
) -> Iterator[None]:
    """Give the sampler uniforms that make it draw these responses, whatever the policy is by then."""

    class ChosenUniforms:
        def __init__(self, seed: int, purpose: str, step: int, samples: np.ndarray, length: int) -> None:
            self._uniforms_BT = torch.full((len(prompts), length), 0.5, dtype=torch.float64)
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                for t, token in enumerate(response):
                    logits_V = lm.table[lm.row(prompt, response[:t])].detach() / temperature
                    p_V = torch.softmax(logits_V.double(), dim=0)
                    self._uniforms_BT[row, t] = p_V[:token].sum() + p_V[token] / 2

        def uniforms(self, position: int) -> Tensor:
            return self._uniforms_BT[:, position]

    with mock.patch.object(ppo, "CounterUniforms", ChosenUniforms):
        yield
