import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import ARCHITECTURES, EOS, PAD, PROMPTS, draw, rows_of, same_bits, tiny_config, tiny_lm

from rlhf_core.config import SamplingConfig
from rlhf_core.rollout import check_context, left_pad, sample
from rlhf_core.seeding import CounterUniforms, GeneratorUniforms

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
CONFIG = tiny_config()


class Fixed:
    """The same uniform for everything."""

    def __init__(self, uniform, rows):
        self._uniforms = torch.full((rows,), uniform, dtype=torch.float64)

    def uniforms(self, position):
        return self._uniforms


def uniforms_of(rows, *, length=6, step=1):
    return CounterUniforms(CONFIG.seed, "test", step, np.asarray(rows), length)


@torch.no_grad()
def all_logits(model, ids):
    """[L, V] by a plain forward pass over one sequence: no cache, no padding, no mask."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def steps_of(model, rollout):
    """Row, position, drawn token and the logits it was drawn from, for every response token."""
    for row, (ids, count) in enumerate(rows_of(rollout)):
        logits = all_logits(model, ids)
        for t in range(count):
            place = len(ids) - count + t
            yield row, t, ids[place], logits[place - 1]


def logprob(logits, token, temperature=1.0):
    z = logits.double().numpy() / temperature
    return z[token] - z.max() - math.log(np.exp(z - z.max()).sum())


def test_left_padding_puts_the_prompt_at_the_right():
    ids, mask = left_pad([[5, 6, 7], [8]], PAD)
    assert ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@architectures
def test_a_left_padded_prompt_is_completed_as_it_would_be_alone(architecture):
    model = tiny_lm(architecture)
    together = draw(model, PROMPTS, CONFIG)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], uniforms_of([row]), CONFIG.sampling, eos_id=EOS, pad_id=PAD)
        assert alone.response_token_ids()[0] == together.response_token_ids()[row]
        n = alone.response_length
        torch.testing.assert_close(
            alone.sampler_logprobs_BT[0], together.sampler_logprobs_BT[row, :n], rtol=0, atol=1e-5
        )


@architectures
def test_completions_do_not_depend_on_the_order_or_number_of_the_rows_beside_them(architecture):
    model = tiny_lm(architecture)
    together = draw(model, PROMPTS, CONFIG).response_token_ids()
    order = [6, 2, 0, 5]
    some = sample(model, [PROMPTS[row] for row in order], uniforms_of(order), CONFIG.sampling, eos_id=EOS, pad_id=PAD)
    assert some.response_token_ids() == [together[row] for row in order]


@architectures
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_over_the_cache_agrees_with_a_full_forward_pass(architecture, temperature):
    model = tiny_lm(architecture)
    rollout = draw(model, PROMPTS, tiny_config(temperature=temperature))
    for row, t, token, logits in steps_of(model, rollout):
        expected = logprob(logits, token, temperature)
        assert rollout.sampler_logprobs_BT[row, t].item() == pytest.approx(expected, abs=1e-5)


@architectures
def test_each_token_is_the_inverse_of_the_cumulative_distribution_at_its_uniform(architecture):
    model = tiny_lm(architecture)
    rollout, source = draw(model, PROMPTS, CONFIG), uniforms_of(range(len(PROMPTS)))
    for row, t, token, logits in steps_of(model, rollout):
        cumulative = torch.softmax(logits.double(), dim=-1).cumsum(0)
        assert token == int((cumulative <= source.uniforms(t)[row]).sum())


@architectures
def test_a_response_ends_with_eos_which_counts_and_nothing_comes_after_it(architecture):
    model = tiny_lm(architecture)
    ended = unended = 0
    for step in range(6):
        rollout = draw(model, PROMPTS, CONFIG, step=step)
        for row, response in enumerate(rollout.response_token_ids()):
            n = len(response)
            mask = [True] * n + [False] * (rollout.response_length - n)
            assert rollout.response_mask_BT[row].tolist() == mask
            assert rollout.attention_mask_BL[row, -rollout.response_length :].bool().tolist() == mask
            assert (rollout.response_ids_BT[row, n:] == PAD).all()
            assert (rollout.sampler_logprobs_BT[row, n:] == 0).all()
            assert EOS not in response[:-1]
            assert bool(rollout.ended_B[row]) == (response[-1] == EOS)
            assert n == CONFIG.sampling.max_new_tokens or response[-1] == EOS
            assert rollout.token_ids()[row] == PROMPTS[row] + response
            ended, unended = ended + (response[-1] == EOS), unended + (response[-1] != EOS)
    assert min(ended, unended) >= 3


def test_padding_with_the_end_token_itself_confuses_nothing():
    model = tiny_lm("gpt2")
    source = uniforms_of(range(len(PROMPTS)))
    same = sample(model, PROMPTS, source, CONFIG.sampling, eos_id=EOS, pad_id=EOS)
    assert same.response_token_ids() == draw(model, PROMPTS, CONFIG).response_token_ids()
    assert same.token_ids() == draw(model, PROMPTS, CONFIG).token_ids()


def test_the_loop_stops_when_every_row_has_ended():
    model = tiny_lm("gpt2")
    rollout = sample(model, PROMPTS, Fixed(0.0, len(PROMPTS)), CONFIG.sampling, eos_id=EOS, pad_id=PAD)
    assert rollout.response_length == 1  # uniform 0 draws token 0, which is EOS
    assert rollout.ended_B.all()
    assert rollout.response_mask_BT.all()


@architectures
def test_top_k_of_one_is_greedy_at_any_uniform(architecture):
    model = tiny_lm(architecture)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        config = SamplingConfig(max_new_tokens=5, top_k=1)
        rollout = sample(model, PROMPTS, Fixed(uniform, len(PROMPTS)), config, eos_id=EOS, pad_id=PAD)
        for _, _, token, logits in steps_of(model, rollout):
            assert token == int(logits.argmax())


def test_a_small_top_p_and_a_low_temperature_are_greedy_too():
    model = tiny_lm("gpt2")
    greedy = SamplingConfig(max_new_tokens=5, top_k=1)
    expected = sample(model, PROMPTS, Fixed(0.9, len(PROMPTS)), greedy, eos_id=EOS, pad_id=PAD).response_token_ids()
    for config in (SamplingConfig(max_new_tokens=5, top_p=1e-6), SamplingConfig(max_new_tokens=5, temperature=1e-3)):
        got = sample(model, PROMPTS, uniforms_of(range(len(PROMPTS))), config, eos_id=EOS, pad_id=PAD)
        assert got.response_token_ids() == expected


def distribution(model, prefix, config):
    """Probabilities by id after temperature, top-k and top-p, on plain numbers in float64."""
    z = all_logits(model, prefix)[-1].double().numpy() / config.temperature
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    ranked = sorted(range(len(p)), key=lambda token: -p[token])[: config.top_k or None]
    mass, kept = sum(p[token] for token in ranked), []
    for token in ranked:
        if kept and sum(p[token] for token in kept) >= config.top_p * mass:
            break
        kept.append(token)
    return {token: p[token] / sum(p[token] for token in kept) for token in kept}


def all_completions(model, prompt, config):
    """Every response with its exact probability."""
    found, open_prefixes = {}, {(): 1.0}
    for position in range(1, config.max_new_tokens + 1):
        longer = {}
        for response, mass in open_prefixes.items():
            for token, p in distribution(model, prompt + list(response), config).items():
                ends = token == EOS or position == config.max_new_tokens
                (found if ends else longer)[(*response, token)] = mass * p
        open_prefixes = longer
    return found


@architectures
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(max_new_tokens=2),
        SamplingConfig(max_new_tokens=3, temperature=1.7, top_k=3),
        SamplingConfig(max_new_tokens=2, temperature=0.8, top_p=0.9),
    ],
    ids=["plain", "top-k", "top-p"],
)
def test_completions_are_as_frequent_as_enumerating_every_one_of_them_says(architecture, config):
    model, prompt, n = tiny_lm(architecture, vocabulary=5), [2, 3], 2000
    exact = all_completions(model, prompt, config)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-9)
    source = CounterUniforms(0, "chi-square", 0, np.arange(n), config.max_new_tokens)
    drawn = sample(model, [prompt] * n, source, config, eos_id=EOS, pad_id=PAD).response_token_ids()
    counts = dict.fromkeys(exact, 0)
    for response in drawn:
        counts[tuple(response)] += 1  # a completion of probability zero is a KeyError
    common = [response for response, p in exact.items() if n * p >= 5]
    rest = n - sum(counts[response] for response in common), n * (1 - sum(exact[response] for response in common))
    observed, expected = [counts[r] for r in common] + [rest[0]], [n * exact[r] for r in common] + [rest[1]]
    if rest[1] < 5:
        observed, expected = observed[:-1], np.array(expected[:-1]) * (sum(observed[:-1]) / sum(expected[:-1]))
    assert len(common) >= 4
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@architectures
def test_a_torch_generator_decides_the_completions_and_nothing_else_does(architecture):
    model = tiny_lm(architecture)
    prompts = PROMPTS * 3

    def drawn(seed, global_seed):
        torch.manual_seed(global_seed)
        source = GeneratorUniforms(torch.Generator().manual_seed(seed), len(prompts))
        return sample(model, prompts, source, CONFIG.sampling, eos_id=EOS, pad_id=PAD)

    with torch.random.fork_rng(devices=[]):
        first, again, other = drawn(1, 10), drawn(1, 20), drawn(2, 10)
    assert same_bits(first.input_ids_BL, again.input_ids_BL)
    assert same_bits(first.sampler_logprobs_BT, again.sampler_logprobs_BT)
    assert first.response_token_ids() != other.response_token_ids()


def test_a_generator_that_goes_on_gives_other_completions_and_its_saved_state_the_same_again():
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(5)
    source = GeneratorUniforms(generator, len(PROMPTS))
    state = generator.get_state()
    first = sample(model, PROMPTS, source, CONFIG.sampling, eos_id=EOS, pad_id=PAD).response_token_ids()
    second = sample(model, PROMPTS, source, CONFIG.sampling, eos_id=EOS, pad_id=PAD).response_token_ids()
    generator.set_state(state)
    assert sample(model, PROMPTS, source, CONFIG.sampling, eos_id=EOS, pad_id=PAD).response_token_ids() == first
    assert second != first


@pytest.mark.parametrize("length", [1, 2, 9])
def test_no_response_is_longer_than_max_new_tokens(length):
    config = SamplingConfig(max_new_tokens=length, top_k=2)
    rollout = sample(tiny_lm("gpt2"), PROMPTS, uniforms_of(range(8), length=length), config, eos_id=99, pad_id=PAD)
    assert rollout.response_length == length
    assert rollout.response_mask_BT.all()
    assert not rollout.ended_B.any()


def test_sampling_leaves_the_models_gradients_and_mode_alone():
    model = tiny_lm("gpt2")
    rollout = draw(model, PROMPTS, CONFIG)
    assert not rollout.sampler_logprobs_BT.requires_grad
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no prompts"), ([[2], []], "prompt 1 is empty"), ([[2], [3] * 27], "prompt 1 has 27 tokens.*context of 32")],
)
def test_prompts_that_cannot_be_completed_are_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_lm("gpt2"), prompts, Fixed(0.5, len(prompts)), CONFIG.sampling, eos_id=EOS, pad_id=PAD)


def test_a_prompt_that_just_fits_the_context_is_completed():
    model = tiny_lm("gpt2")
    check_context(model, [[2] * 26], 6)
    rollout = sample(model, [[2] * 26], Fixed(0.5, 1), CONFIG.sampling, eos_id=99, pad_id=PAD)
    assert rollout.input_ids_BL.shape == (1, 32)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        draw(tiny_lm("gpt2", dropout=0.5).train(), PROMPTS, CONFIG)
