"""The enumerated world itself: it is complete, its models answer to the trainer, and its sums are right."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from rlhf_core.config import SamplingConfig
from rlhf_core.rollout import sample
from rlhf_core.seeding import CounterUniforms
from rlhf_core.testing.tabular import TabularPolicy, tabular_states
from rlhf_core.testing.world import (
    World,
    double_precision,
    entropy,
    expectation,
    gradient,
    kl,
    objective,
    optimum,
    sequence_logprobs,
    token_logprobs,
)
from rlhf_core.testing.world_models import ARCHITECTURES, tiny_transformer

pytestmark = pytest.mark.m4
SMALL = World(vocabulary=3, length=2, prompts=((2,), (1, 2)))
LARGE = World(vocabulary=8, length=4, prompts=((2, 5),))


def model(kind, world, seed=0):
    return TabularPolicy(world, seed=seed) if kind == "tabular" else tiny_transformer(world, kind, seed=seed)


kinds = pytest.mark.parametrize("kind", ["tabular", *ARCHITECTURES])


def test_a_small_world_is_this_list():
    assert SMALL.responses == ((0,), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    assert SMALL.prefixes == ((), (1,), (2,))
    assert [SMALL.ended(response) for response in SMALL.responses] == [True] * 3 + [False] * 4
    rollout = SMALL.rollout(1)
    assert rollout.input_ids_BL.tolist()[:2] == [[1, 2, 0, 1], [1, 2, 1, 0]]
    assert rollout.response_mask_BT.tolist()[:2] == [[True, False], [True, True]]
    assert rollout.attention_mask_BL.tolist()[0] == [1, 1, 1, 0]
    assert rollout.response_token_ids() == [list(response) for response in SMALL.responses]


@pytest.mark.parametrize(("vocabulary", "length"), [(3, 1), (4, 3), (8, 4)])
def test_a_world_has_as_many_responses_as_there_are(vocabulary, length):
    world = World(vocabulary=vocabulary, length=length, prompts=((2,),))
    n = vocabulary - 1
    assert len(world.responses) == len(set(world.responses)) == sum(n**k for k in range(length)) + n**length
    assert len(world.prefixes) == sum(n**k for k in range(length))


@kinds
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_probabilities_of_a_large_world_sum_to_one(kind, temperature):
    logp_N = sequence_logprobs(LARGE, model(kind, LARGE), 0, temperature=temperature)
    assert logp_N.dtype == torch.float64
    assert math.fsum(logp_N.exp().tolist()) == pytest.approx(1.0, abs=1e-12)


@kinds
def test_a_response_has_the_probability_that_reading_it_token_by_token_gives(kind):
    world, lm = SMALL, model(kind, SMALL)
    for prompt, tokens in enumerate(world.prompts):
        found = sequence_logprobs(world, lm, prompt).tolist()
        for response, logp in zip(world.responses, found, strict=True):
            alone = 0.0
            for t, token in enumerate(response):
                logits = lm(input_ids=torch.tensor([[*tokens, *response[:t]]])).logits[0, -1].tolist()
                alone += logits[token] - math.log(math.fsum(map(math.exp, logits)))
            assert logp == pytest.approx(alone, abs=1e-12)


@kinds
def test_the_real_sampler_draws_a_response_as_often_as_its_probability_says(kind):
    """χ² over all responses of both prompts, one of which is padded on the left."""
    n = 4000
    world, lm = SMALL, model(kind, SMALL)
    config = SamplingConfig(max_new_tokens=world.length, temperature=1.25)
    prompts = [list(prompt) for prompt in world.prompts for _ in range(n)]
    uniforms = CounterUniforms(1, "test", 0, np.arange(len(prompts)), world.length)
    rollout = sample(lm, prompts, uniforms, config, eos_id=world.eos_id, pad_id=world.pad_id)
    drawn = rollout.response_token_ids()
    for prompt in range(2):
        counts = np.zeros(len(world.responses))
        for response in drawn[prompt * n : (prompt + 1) * n]:
            counts[world.row_of[tuple(response)]] += 1
        expected = n * sequence_logprobs(world, lm, prompt, temperature=1.25).exp().detach().numpy()
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < 22.46  # χ² with 6 degrees of freedom exceeds it once in a thousand


@kinds
def test_the_samplers_log_probs_are_the_worlds(kind):
    world, lm = SMALL, model(kind, SMALL)
    uniforms = CounterUniforms(2, "test", 0, np.arange(2), world.length)
    with double_precision():
        rollout = sample(
            lm,
            [list(prompt) for prompt in world.prompts],
            uniforms,
            SamplingConfig(max_new_tokens=2),
            eos_id=0,
            pad_id=1,
        )
    for row, response in enumerate(rollout.response_token_ids()):
        exact = token_logprobs(world, lm, row)[world.row_of[tuple(response)]]
        torch.testing.assert_close(
            rollout.sampler_logprobs_BT[row], exact[: rollout.response_length].detach(), rtol=0, atol=1e-12
        )


def test_the_optimum_is_better_than_any_other_policy_and_its_value_is_beta_log_z():
    generator = torch.Generator().manual_seed(0)
    ref_logp = sequence_logprobs(SMALL, TabularPolicy(SMALL, seed=1), 0).detach()
    rewards = torch.randn(len(ref_logp), generator=generator, dtype=torch.float64)
    for beta in (0.1, 1.0, 10.0):
        best = optimum(ref_logp, rewards, beta=beta)
        value = objective(best, ref_logp, rewards, beta=beta)
        log_z = torch.logsumexp(ref_logp + rewards / beta, dim=0)
        assert float(value) == pytest.approx(beta * float(log_z), rel=1e-12)
        for seed in range(10):
            other = sequence_logprobs(SMALL, TabularPolicy(SMALL, seed=seed), 0).detach()
            gap = value - objective(other, ref_logp, rewards, beta=beta)
            assert float(gap) == pytest.approx(beta * float(kl(other, best)), rel=1e-9)  # and so it is positive


def test_kl_and_entropy_are_those_of_hand_worked_coins():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    assert float(kl(p, q)) == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert float(entropy(p)) == pytest.approx(1.5 * math.log(2), rel=1e-12)
    assert float(expectation(p, torch.tensor([4.0, 0.0, 8.0], dtype=torch.float64))) == 4.0


@kinds
def test_the_score_function_has_expectation_zero(kind):
    lm = model(kind, SMALL)
    logp = sequence_logprobs(SMALL, lm, 0)
    grads = gradient(expectation(logp.detach(), logp), lm)
    assert max(float(grad.abs().max()) for grad in grads.values()) < 1e-14


def test_the_rows_of_a_table_are_its_prefixes_wherever_padding_stands():
    world = SMALL
    policy = TabularPolicy(world)
    ids = torch.tensor([[1, 1, 2, 1, 0], [1, 2, 1, 0, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    hidden = policy(input_ids=ids, attention_mask=mask).last_hidden_state
    states = [[policy.states[int(row)] for row in rows] for rows in hidden.argmax(-1)]
    assert states[0][2:] == [(2,), (2, 1), (2, 1, 0)]
    assert states[1] == [(), (1, 2), (1, 2, 1), (1, 2, 1, 0), (1, 2, 1, 0)]  # (1,) alone is no prefix of this world
    assert len(tabular_states(world)) == 1 + 2 * (3 + 7)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompts": ()}, "needs prompts"),
        ({"prompts": ((),)}, "needs prompts"),
        ({"prompts": ((2,), (2, 3))}, r"prompt \(2,\) begins prompt \(2, 3\)"),
        ({"prompts": ((2,), (2,))}, "begins"),
        ({"prompts": ((4,),)}, "cannot hold the tokens"),
        ({"length": 0}, "the length is at least 1"),
        ({"eos_id": -1}, "cannot hold the tokens"),
        ({"vocabulary": 50, "length": 4}, "more responses than can be enumerated"),
    ],
)
def test_a_world_that_cannot_be_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        World(**fields)


def test_double_precision_ends_with_its_block_even_after_an_error():
    def fail_inside():
        with double_precision():
            assert torch.zeros(1).dtype == torch.float64
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.zeros(1).dtype == torch.float32


def test_every_response_is_reached_by_some_uniforms():
    """The sampler, fed a grid of uniforms, draws each response of a uniform policy in its exact proportion."""
    world = World(vocabulary=4, length=2, prompts=((2,),))
    lm = TabularPolicy(world, torch.zeros(len(tabular_states(world)), 4, dtype=torch.float64))
    grid = torch.tensor(list(itertools.product([0.125, 0.375, 0.625, 0.875], repeat=2)), dtype=torch.float64)

    class Grid:
        def uniforms(self, position):
            return grid[:, position]

    rollout = sample(lm, [[2]] * 16, Grid(), SamplingConfig(max_new_tokens=2), eos_id=0, pad_id=1)
    drawn = [tuple(response) for response in rollout.response_token_ids()]
    assert sorted(set(drawn)) == sorted(world.responses)
    assert drawn.count((0,)) == 4
    assert all(drawn.count(response) == 1 for response in world.responses if len(response) == 2)


def test_a_table_heeds_the_positions_that_it_is_given():
    """A row padded on the left: columns counted from the padding on are not where its tokens stand."""
    lm = TabularPolicy(SMALL)
    ids, mask = torch.tensor([[1, 2, 2, 0], [1, 2, 1, 0]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])

    def logits(**positions):
        return lm(input_ids=ids, attention_mask=mask, **positions).logits

    by_mask = logits()
    assert torch.equal(logits(position_ids=torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])), by_mask)
    by_columns = logits(position_ids=torch.arange(4).expand(2, 4))
    assert torch.equal(by_columns[1], by_mask[1])
    assert torch.equal(by_columns[0, 1:], lm.table[0].expand(3, 3))
    assert not (by_columns[0, 1:] == by_mask[0, 1:]).all(dim=-1).any()


def test_a_table_heeds_the_positions_of_what_follows_a_cache():
    lm = TabularPolicy(SMALL)
    ids, mask = torch.tensor([[1, 2, 2]]), torch.tensor([[0, 1, 1]])
    cache = lm(input_ids=ids[:, :2], attention_mask=mask[:, :2], past_key_values=DynamicCache()).past_key_values
    rest = {"input_ids": ids[:, 2:], "attention_mask": mask}
    right = lm(**rest, past_key_values=copy.deepcopy(cache), position_ids=torch.tensor([[1]])).logits
    wrong = lm(**rest, past_key_values=cache, position_ids=torch.tensor([[2]])).logits
    assert torch.equal(right, lm(input_ids=ids, attention_mask=mask).logits[:, 2:])
    assert torch.equal(wrong[0, 0], lm.table[0])
