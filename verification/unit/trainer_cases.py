"""What the tests of the trainer share: a step, a minibatch with spread ratios, each sequence alone in float64."""

import copy
import dataclasses

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    EOS,
    PAD,
    PROMPTS,
    VALUES,
    draw,
    rows_of,
    same_bits,
    share_of_sevens,
    snapshot,
    tiny_config,
    tiny_state,
)

from rlhf_core.ppo import learn, ppo_step
from rlhf_core.profiling import StageClock
from rlhf_core.scoring import Scores, evaluate_rows
from rlhf_core.targets import Targets
from rlhf_core.updates import accumulate_gradients

ALGORITHM_NAMES = ("ppo", "grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline")
CRITIC_FREE = ALGORITHM_NAMES[1:]

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
algorithms = pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
values = pytest.mark.parametrize("value", VALUES)


def step_once(state, config, reward=share_of_sevens, prompts=PROMPTS):
    return ppo_step(state, prompts[: config.ppo.prompts_per_step], reward, config, eos_id=EOS, pad_id=PAD)


def algorithm_case(algorithm, architecture="llama", **settings):
    """The configuration and the state of an algorithm: two prompts of four completions where it compares them."""
    groups = {} if algorithm in ("ppo", "reinforce++") else {"group_size": 4}
    config = tiny_config(algorithm=algorithm, **(groups | settings))
    return config, tiny_state(architecture, config.value_model, config, reference_seed=1)


def rollout_of(config, state):
    """A step's rollout, drawn as the step does, groups side by side."""
    prompts = [prompt for prompt in PROMPTS[: config.ppo.prompts_per_step] for _ in range(config.ppo.recipe.group_size)]
    return draw(state.model.lm, prompts, config)


def plan_of(*sizes):
    """One minibatch, its rows in order, in micro-batches of these sizes."""
    return list(torch.arange(sum(sizes)).split(list(sizes)))


def sequences_alone(state, rollout, temperature=1.0):
    """Per sequence, from a float64 copy and without padding: log-probs, entropies, values, reference log-probs."""
    model, reference = copy.deepcopy(state.model).double(), copy.deepcopy(state.reference).double()
    trunk = model.lm.base_model if model.value_trunk is None else model.value_trunk
    found = []
    for ids, count in rows_of(rollout):
        tokens = torch.tensor([ids])
        logp = (model.lm(input_ids=tokens, use_cache=False).logits[0, -count - 1 : -1] / temperature).log_softmax(-1)
        ref = (reference.lm(input_ids=tokens, use_cache=False).logits[0, -count - 1 : -1] / temperature).log_softmax(-1)
        hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state[0, -count - 1 : -1]
        head = model.value_head
        drawn = tokens[0, -count:, None]
        found.append(
            {
                "logprobs": logp.gather(1, drawn)[:, 0],
                "entropies": -(logp.exp() * logp).sum(-1),
                "values": None if head is None else head(hidden)[:, 0],
                "ref_logprobs": ref.gather(1, drawn)[:, 0],
                "model": model,
            }
        )
    return found


def off_policy_case(architecture, value, double):
    """A minibatch whose ratios are spread around 1, old values away from the new, and lengths that differ."""
    config = tiny_config(minibatch_size=8, micro_batch_size=8)
    state = tiny_state(architecture, value, config)
    rollout = draw(state.model.lm, PROMPTS, config)
    if double:  # transformers' eager attention of Llama takes its softmax in float32, where a padded row is then NaN
        state.model.double()
        for trunk in filter(None, (state.model.lm, state.model.value_trunk)):
            trunk.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        logprobs, entropies, got_values = evaluate_rows(state.model, rollout, torch.arange(8), 1.0, "float32")
    noise = [torch.randn(logprobs.shape, generator=generator, dtype=torch.float64).to(logprobs.dtype) for _ in range(4)]
    scores = Scores(logprobs + 0.3 * noise[0], entropies, got_values + 0.3 * noise[1], logprobs)
    return config, state, rollout, scores, Targets(noise[2], got_values + noise[3])


def gradient_of(case, minibatch):
    """The gradient of every parameter, and what the minibatch added up."""
    config, state, rollout, scores, targets = case
    state.model.zero_grad(set_to_none=True)
    sums = accumulate_gradients(state, rollout, scores, targets, minibatch, config, StageClock(1))
    return {name: p.grad.clone() for name, p in state.model.named_parameters() if p.requires_grad}, sums


def learned(state, rollout, config, reward=share_of_sevens):
    """The metrics and the weights after a step's learning from a rollout; the state itself stays."""
    state = copy.deepcopy(state)
    result = learn(state, rollout, reward, config, StageClock(), eos_id=EOS)
    return result.metrics | {"kl of each": result.kl_B.tolist()}, snapshot(state.model)


def assert_same_run(first, second):
    assert first[0] == second[0]
    assert all(same_bits(first[1][name], second[1][name]) for name in first[1])


def padded_more(rollout, left, right):
    """The same sequences with more padding on both sides."""

    def widen(x, before, fill):
        shape = (len(x), before), (len(x), right)
        return torch.cat([x.new_full(shape[0], fill), x, x.new_full(shape[1], fill)], dim=1)

    return dataclasses.replace(
        rollout,
        input_ids_BL=widen(rollout.input_ids_BL, left, PAD),
        attention_mask_BL=widen(rollout.attention_mask_BL, left, 0),
        response_mask_BT=widen(rollout.response_mask_BT, 0, False),
        sampler_logprobs_BT=widen(rollout.sampler_logprobs_BT, 0, 0.0),
    )
