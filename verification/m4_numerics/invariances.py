"""What must not change the trainer's result, each as a function that measures how far it does.

Each takes the configuration, a state in float64 and a rollout, learns from the rollout in two ways that mean the same,
and returns the largest deviation of metrics and weights, relative to the largest movement of a weight.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import EOS, share_of_sevens
from trainer_cases import algorithm_case, padded_more, rollout_of

from rlhf_core import scoring
from rlhf_core.config import TrainConfig
from rlhf_core.policy import ActorCritic
from rlhf_core.ppo import learn
from rlhf_core.profiling import StageClock
from rlhf_core.rollout import Rollout
from rlhf_core.updates import PPOState

RATE = 0.05
Outcome = tuple[dict[str, float], dict[str, torch.Tensor]]
ORDER = torch.tensor([5, 7, 4, 6, 1, 3, 0, 2])
"""Another order of eight rows, in which the groups of four change places and their members too."""


def case(algorithm: str, architecture: str = "llama", **settings) -> tuple[TrainConfig, PPOState, Rollout]:
    """An algorithm's configuration, a float64 state away from its reference, and a rollout of eight completions."""
    settings = {"minibatch_size": 8, "micro_batch_size": 8, "kl_control": "fixed", "max_grad_norm": 1e9} | settings
    config, state = algorithm_case(algorithm, architecture, **settings)
    rollout = rollout_of(config, state)
    double(state)
    return config, state, dataclasses.replace(rollout, sampler_logprobs_BT=rollout.sampler_logprobs_BT.double())


def double(state: PPOState) -> None:
    """Turn the models to float64; the eager attention of transformers' Llama would take its softmax in float32."""
    for model in (state.model, state.reference):
        model.double()
    for trunk in filter(None, (state.model.lm, state.model.value_trunk, state.reference.lm)):
        trunk.set_attn_implementation("sdpa")


def learned(config: TrainConfig, state: PPOState, rollout: Rollout, *, rate: float = RATE) -> Outcome:
    """The metrics and the movement of every weight, under plain gradient descent: Adam would divide small ones up."""
    state = copy.deepcopy(state)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=rate)
    config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, learning_rate=rate))
    before = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
    result = learn(state, rollout, share_of_sevens, config, StageClock(), eos_id=EOS)
    movement = {name: (p.detach() - before[name]).double() for name, p in state.model.named_parameters()}
    return result.metrics, movement


def deviation(one: Outcome, other: Outcome) -> float:
    """The largest difference of a metric, relative to it, or of a weight's movement, relative to the largest."""
    assert one[0].keys() == other[0].keys()
    largest = max(float(x.abs().max()) for x in one[1].values())
    assert largest > 1e-3, "nothing moved, which proves nothing"
    weights = max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1]) / largest
    metrics = max((abs(a - other[0][name]) / max(abs(a), 1.0) for name, a in one[0].items()), default=0.0)
    return max(weights, metrics)


def with_ppo(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, **changes))


def of_micro_batches(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """Gradient accumulation: one forward pass of eight rows, against eight of one and four of two."""
    whole = learned(config, state, rollout)
    return max(deviation(whole, learned(with_ppo(config, micro_batch_size=n), state, rollout)) for n in (1, 2, 4))


def of_order(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """The rows of the batch in another order."""
    rows = (getattr(rollout, field.name)[ORDER] for field in dataclasses.fields(rollout))
    return deviation(learned(config, state, rollout), learned(config, state, Rollout(*rows)))


def of_left_padding(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """Three columns of padding more before the prompts."""
    return deviation(learned(config, state, rollout), learned(config, state, padded_more(rollout, 3, 0)))


def of_right_padding(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """Four columns of padding more behind the responses."""
    return deviation(learned(config, state, rollout), learned(config, state, padded_more(rollout, 0, 4)))


def of_packing(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """Real tokens side by side, against padded rows through the model's own ``forward``."""
    packed = learned(config, state, rollout)
    with padded_rows():
        return deviation(packed, learned(config, state, rollout))


@contextmanager
def padded_rows() -> Iterator[None]:
    """Let every model's tokens go through its own ``forward``, padding and all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "packable", lambda model: None)
        yield


def of_response_head(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """The head over the response's positions alone, against the head over every position."""
    everywhere = copy.deepcopy(state)
    for owner in (everywhere.model, everywhere.reference):
        owner._arguments.keep = lambda positions: {}
    short = state.model.lm(input_ids=rollout.input_ids_BL, logits_to_keep=2).logits.shape[1]
    assert short == 2, "the head is not limited at all"
    with padded_rows():
        return deviation(learned(config, state, rollout), learned(config, everywhere, rollout))


def of_value_network(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """The policy's movement with a value network of its own, against one whose loss weighs nothing.

    A separate value model shares no weight with the policy, so its loss must not move the policy, whatever it weighs.
    """
    (_, moved), (_, alone) = (learned(with_ppo(config, value_coef=c), state, rollout) for c in (0.5, 0.0))
    policy = [name for name in moved if name.startswith("lm.")]
    return deviation(({}, {name: moved[name] for name in policy}), ({}, {name: alone[name] for name in policy}))


def of_shared_head(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """A value head on the policy's trunk, against one on a copy of it: the same function until the first update."""
    shared, separate = copy.deepcopy(state), copy.deepcopy(state)
    for one, value in ((shared, "shared"), (separate, "separate")):
        head = one.model.value_head
        one.model = ActorCritic(one.model.lm, value).double()
        one.model.value_head.load_state_dict(head.state_dict())
        one.model.requires_grad_(True)  # the copy's token embeddings too, which are frozen otherwise
    once = with_ppo(config, epochs=1)
    (metrics, moved), (other, apart) = (learned(once, one, rollout) for one in (shared, separate))
    names = metrics.keys() - {"grad_norm", "grad_norm_max"}  # of other sets of parameters
    summed = {}  # what the shared trunk feels of both losses, the separate one feels in two places
    for name, movement in apart.items():
        target = name.replace("value_trunk.", f"lm.{state.model.lm.base_model_prefix}.")
        summed[target] = summed.get(target, 0.0) + movement
    return deviation(({n: metrics[n] for n in names}, moved), ({n: other[n] for n in names}, summed))


def of_temperature(config: TrainConfig, state: PPOState, rollout: Rollout) -> float:
    """Temperature 0.7, against weights whose logits are 1/0.7 as large: the same policy."""
    temperature = 0.7
    warm = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, temperature=temperature))
    sharp = copy.deepcopy(state)
    with torch.no_grad():
        for norm in (final_norm(sharp.model.lm), final_norm(sharp.reference.lm)):
            for parameter in norm.parameters():
                parameter /= temperature
    (metrics, moved), (other, scaled) = (
        learned(with_ppo(c, epochs=1), s, rollout) for c, s in ((warm, state), (config, sharp))
    )
    # By the chain rule the gradient of the scaled weights is T times as large; so the gradient norms differ.
    scaled = {n: x / temperature if n.startswith(final_norm_name(state.model.lm)) else x for n, x in scaled.items()}
    names = metrics.keys() - {"grad_norm", "grad_norm_max"}
    return deviation(({n: metrics[n] for n in names}, moved), ({n: other[n] for n in names}, scaled))


def final_norm_name(lm: torch.nn.Module) -> str:
    return "lm.transformer.ln_f" if hasattr(lm, "transformer") else "lm.model.norm"


def final_norm(lm: torch.nn.Module) -> torch.nn.Module:
    return lm.get_submodule(final_norm_name(lm).removeprefix("lm."))


EXACT: dict[str, Callable[[TrainConfig, PPOState, Rollout], float]] = {
    "micro-batches": of_micro_batches,
    "order": of_order,
    "left padding": of_left_padding,
    "right padding": of_right_padding,
    "packing": of_packing,
    "response head": of_response_head,
    "temperature": of_temperature,
}
"""Of every algorithm."""

OF_VALUES = {"value network": of_value_network, "shared head": of_shared_head}
"""Where there are values."""
