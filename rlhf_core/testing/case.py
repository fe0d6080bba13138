"""A PPO step with everything given, and what it did: the question that a property asks of a trainer.

A trainer under test is one function from :class:`Case` to :class:`Outcome`. It must do what its name says with plain
gradient descent in place of its optimizer, so that a change of parameters *is* a gradient::

    def my_trainer(case: Case) -> Outcome:
        lm, reference = case.policy(), case.reference()  # causal language models, see rlhf_core.testing.tabular
        ...  # sample nothing: the responses are given; take case.steps steps of SGD

Shape suffixes: S prefixes (the rows of a :class:`~rlhf_core.testing.tabular.TabularPolicy`), V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_core.testing.tabular import TabularPolicy, tabular_states
from rlhf_core.testing.world import Tokens, World

PLAIN: Mapping[str, Any] = {
    "algorithm": "ppo",
    "steps": 1,
    "epochs": 1,
    "learning_rate": 1.0,
    "schedule": "constant",
    "max_grad_norm": 1e9,
    "gamma": 1.0,
    "lam": 1.0,
    "clip_range": 0.2,
    "value_clip_range": 1e9,
    "value_coef": 0.5,
    "whiten_advantages": False,
    "whiten_rewards": False,
    "kl_coef": 0.0,
    "kl_control": "fixed",
    "missing_eos_penalty": 0.0,
}
"""PPO settings under which a step is one exact gradient; names and meaning as in ``rlhf_core.config.PPOConfig``."""


@dataclass(frozen=True)
class Case:
    """Prompts, responses and scores of a batch, the models, and the settings of the step."""

    world: World
    prompts: tuple[int, ...]
    """Which prompt each row has; ``world.prompts[i]`` are its tokens. The rows of a group stand side by side."""
    responses: tuple[Tokens, ...]
    """What is drawn for each row, in every step."""
    scores: tuple[float, ...]
    """The task's reward of each row; short binary fractions, so that float32 holds them exactly."""
    policy_SV: Tensor
    """The table of the policy at the start."""
    reference_SV: Tensor
    """The table of the frozen reference."""
    values_S: Tensor
    """The table of the value head at the start."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from :data:`PLAIN`; ``minibatch_size`` and ``micro_batch_size`` are the batch unless given."""
    temperature: float = 1.0
    """The policy is softmax(logits / temperature)."""
    dropout: float = 0.0
    """Probability of a dropout that policy and reference carry and that training must leave off."""

    @cached_property
    def ppo(self) -> dict[str, Any]:
        """All settings."""
        n = len(self.prompts)
        sizes = {"batch_size": n, "minibatch_size": n, "micro_batch_size": self.settings.get("minibatch_size", n)}
        return {**PLAIN, **sizes, **self.settings}

    def policy(self) -> TabularPolicy:
        """Return the policy as a model to train."""
        return TabularPolicy(self.world, self.policy_SV, dropout=self.dropout)

    def reference(self) -> TabularPolicy:
        """Return the reference as a model."""
        return TabularPolicy(self.world, self.reference_SV, dropout=self.dropout)

    def states(self, row: int) -> list[int]:
        """Return the table's row at each token of a response."""
        prompt, response = self.world.prompts[self.prompts[row]], self.responses[row]
        index = {state: at for at, state in enumerate(tabular_states(self.world))}
        return [index[(*prompt, *response[:t])] for t in range(len(response))]

    def change(self, **fields: Any) -> "Case":
        """Return the case with other fields, and settings merged into its own."""
        settings = {**self.settings, **fields.pop("settings", {})}
        return dataclasses.replace(self, settings=settings, **fields)


@dataclass(frozen=True)
class Outcome:
    """What the steps left behind, float64."""

    policy_SV: Tensor
    """The policy's table."""
    values_S: Tensor
    """The value head's table."""
    reference_SV: Tensor
    """The reference's table."""
    kl_coef: float
    """The KL coefficient of the next step."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the last step logged, under the names of ``rlhf_core.metrics``; what is missing is not asked for."""


class Trainer(Protocol):
    """A trainer under test."""

    def __call__(self, case: Case) -> Outcome:
        """Take the case's steps and return what they did.

        Raises:
            NotImplementedError: this trainer does not have what a setting asks for; the property is left out.
        """
        ...


def random_case(
    world: World, prompts: tuple[int, ...], responses: tuple[Tokens, ...], scores: tuple[float, ...], **settings: Any
) -> Case:
    """Return a case with drawn tables: values of deviation 1 before the end, and 100 behind it, where none is due."""
    generator = torch.Generator().manual_seed(5)
    states = tabular_states(world)
    shape = (len(states), world.vocabulary)
    policy_SV, reference_SV = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    live = {(*prompt, *prefix) for prompt in world.prompts for prefix in world.prefixes}
    values_S = torch.randn(len(states), generator=generator, dtype=torch.float64)
    values_S = torch.where(torch.tensor([state in live for state in states]), values_S, 100.0)
    return Case(world, prompts, responses, scores, policy_SV, reference_SV, values_S, settings)
