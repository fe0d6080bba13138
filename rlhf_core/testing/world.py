"""A world so small that every response can be written down, so that every expectation is a finite sum.

With a vocabulary of at most a dozen tokens and responses of at most four, the expected gradient of an estimator, the KL
and the entropy of a policy, and the optimum of the KL-regularised objective are known to the last digit of float64.
That makes an oracle for any trainer of language models::

    from rlhf_core.testing.tabular import TabularPolicy
    from rlhf_core.testing.world import World, kl, optimum, sequence_logprobs

    world = World(vocabulary=4, length=3, prompts=((2,), (3, 2)))
    reference = TabularPolicy(world, seed=1)  # a causal language model with a row of logits for each prefix
    policy = my_trainer(reference, my_reward, beta=0.5)
    for prompt in range(len(world.prompts)):
        best = optimum(sequence_logprobs(world, reference, prompt), my_rewards(world, prompt), beta=0.5)
        assert kl(sequence_logprobs(world, policy, prompt), best) < 1e-3

Nothing here calls the code under test: log-probs are ``log_softmax`` and ``gather`` of the model's own logits.

Shape suffixes: N responses of the world, P prompt positions, L = P + T, T response positions, V vocabulary.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from rlhf_core.rollout import Rollout

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """The responses of at most ``length`` tokens to each prompt; a response ends with ``eos_id`` or at the length."""

    vocabulary: int = 4
    """V; every token can be drawn, the padding token too: what is padding is said by the mask, not by the id."""
    length: int = 3
    """T, the longest response, the end-of-sequence token included."""
    prompts: tuple[Tokens, ...] = ((2,), (3, 2))
    """None begins with another, so that the tokens so far tell which prompt it is."""
    eos_id: int = 0
    """Ends a response and belongs to it."""
    pad_id: int = 1
    """Fills the rest."""

    def __post_init__(self) -> None:
        tokens = {self.eos_id, self.pad_id, *itertools.chain(*self.prompts)}
        if not self.prompts or not all(self.prompts):
            raise ValueError("a world needs prompts of at least one token; give prompts=((2,), …)")
        if self.length < 1 or not tokens <= set(range(self.vocabulary)):
            raise ValueError(
                f"a world of vocabulary {self.vocabulary} and length {self.length} cannot hold the tokens "
                f"{sorted(tokens)}; the length is at least 1 and tokens lie in [0, {self.vocabulary})"
            )
        for a, b in itertools.permutations(self.prompts, 2):
            if a == b[: len(a)]:
                raise ValueError(f"prompt {a} begins prompt {b}; no prompt may begin another")
        if self.vocabulary**self.length > 100_000:
            raise ValueError(
                f"vocabulary {self.vocabulary} and length {self.length} make more responses than can be enumerated; "
                "take fewer"
            )

    @cached_property
    def responses(self) -> tuple[Tokens, ...]:
        """Every response, in order of length and then of tokens; their probabilities sum to 1 under any policy."""
        open_tokens = [token for token in range(self.vocabulary) if token != self.eos_id]
        ended = [
            (*prefix, self.eos_id)
            for length in range(self.length)
            for prefix in itertools.product(open_tokens, repeat=length)
        ]
        return (*ended, *itertools.product(open_tokens, repeat=self.length))

    @cached_property
    def row_of(self) -> dict[Tokens, int]:
        """The place of each response in :attr:`responses`."""
        return {response: row for row, response in enumerate(self.responses)}

    @cached_property
    def prefixes(self) -> tuple[Tokens, ...]:
        """Every beginning of a response after which another token is drawn: the states of the decision process."""
        found = {response[:t] for response in self.responses for t in range(len(response))}
        return tuple(sorted(found, key=lambda prefix: (len(prefix), prefix)))

    def ended(self, response: Tokens) -> bool:
        """Return whether a response ended by itself, and was not cut."""
        return response[-1] == self.eos_id

    def rollout(self, prompt: int, *, dtype: torch.dtype = torch.float64) -> Rollout:
        """Return every response to a prompt as one rollout; its ``sampler_logprobs`` are zeros."""
        ids_NT = torch.full((len(self.responses), self.length), self.pad_id)
        mask_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
        for row, response in enumerate(self.responses):
            ids_NT[row, : len(response)] = torch.tensor(response)
            mask_NT[row, : len(response)] = True
        prompt_NP = torch.tensor([self.prompts[prompt]]).expand(len(ids_NT), -1)
        return Rollout(
            input_ids_BL=torch.cat([prompt_NP, ids_NT], dim=1),
            attention_mask_BL=torch.cat([torch.ones_like(prompt_NP), mask_NT.long()], dim=1),
            response_mask_BT=mask_NT,
            sampler_logprobs_BT=torch.zeros(mask_NT.shape, dtype=dtype),
            ended_B=torch.tensor([self.ended(response) for response in self.responses]),
        )


def token_distributions(world: World, lm: nn.Module, prompt: int, *, temperature: float = 1.0) -> Tensor:
    """Return [N, T, V] log π(· | prompt, response so far) at each position of each response, differentiable in ``lm``.

    Args:
        world: what is enumerated.
        lm: ``lm(input_ids=, attention_mask=)`` returns an object with ``logits`` [N, L, V]. No prompt is padded.
        prompt: which of the world's prompts.
        temperature: the policy is softmax(logits / temperature).
    """
    rollout = world.rollout(prompt)
    logits_NLV = lm(input_ids=rollout.input_ids_BL, attention_mask=rollout.attention_mask_BL).logits
    start = len(world.prompts[prompt]) - 1  # the last token of the prompt predicts the first of the response
    return torch.log_softmax(logits_NLV[:, start:-1].double() / temperature, dim=-1)


def token_logprobs(world: World, lm: nn.Module, prompt: int, *, temperature: float = 1.0) -> Tensor:
    """Return [N, T] log π of each token of each response, 0 behind its end; differentiable in ``lm``."""
    rollout = world.rollout(prompt)
    logp_NTV = token_distributions(world, lm, prompt, temperature=temperature)
    logp_NT = logp_NTV.gather(-1, rollout.response_ids_BT[..., None])[..., 0]
    return torch.where(rollout.response_mask_BT, logp_NT, 0.0)


def sequence_logprobs(world: World, lm: nn.Module, prompt: int, *, temperature: float = 1.0) -> Tensor:
    """Return [N] log π(response | prompt), differentiable in ``lm``."""
    return token_logprobs(world, lm, prompt, temperature=temperature).sum(dim=1)


def expectation(logp_N: Tensor, x_N: Tensor) -> Tensor:
    """Return Σ p x over the world, the first dimension of ``x_N``."""
    return torch.tensordot(logp_N.exp(), x_N, dims=1)


def kl(logp_N: Tensor, logq_N: Tensor) -> Tensor:
    """Return KL(p‖q) = Σ p (log p − log q) in nats."""
    return expectation(logp_N, logp_N - logq_N)


def entropy(logp_N: Tensor) -> Tensor:
    """Return −Σ p log p in nats, of whole responses."""
    return -expectation(logp_N, logp_N)


def optimum(ref_logp_N: Tensor, rewards_N: Tensor, *, beta: float) -> Tensor:
    """Return [N] log π* of the maximum of E[r] − β KL(π‖π_ref): π* ∝ π_ref exp(r/β).

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), section 2.
    """
    return torch.log_softmax(ref_logp_N + rewards_N / beta, dim=0)


def objective(logp_N: Tensor, ref_logp_N: Tensor, rewards_N: Tensor, *, beta: float) -> Tensor:
    """Return J = E[r] − β KL(π‖π_ref), exact."""
    return expectation(logp_N, rewards_N) - beta * kl(logp_N, ref_logp_N)


def gradient(value: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Return ∂value/∂parameter by name, zeros where a parameter has no part in it."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), grads, strict=True)
    }


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Make float64 torch's default dtype inside, so that a trainer's own buffers are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
