import random
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import few_examples, same_bits

from rlhf_core.seeding import (
    CounterUniforms,
    GeneratorUniforms,
    permutation,
    raw_uniforms,
    rng_state,
    set_all_seeds,
    set_rng_state,
    stream,
)

WORD = 2**64
LITERAL_UNIFORMS = [0.9323047689425727, 0.265365168769064, 0.1215496829177718, 0.7877623881554944, 0.6102397297855034]
LITERAL_PERMUTATION = [8, 2, 4, 3, 6, 5, 9, 7, 0, 1]


@pytest.fixture(autouse=True)
def _global_generators_put_back():
    before, deterministic = rng_state(), torch.are_deterministic_algorithms_enabled()
    yield
    set_rng_state(before)
    torch.use_deterministic_algorithms(deterministic)


def philox(key, counter):
    """Philox 4x64-10 as in Salmon et al. (2011), section 3.3, on Python's whole numbers."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], WORD)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], WORD)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return x


def uniforms_by_hand(seed, purpose, step, sample, length):
    """NumPy counts up before each block of four, so the first block has counter 1."""
    words = [
        word
        for block in range(1, 2 + length // 4)
        for word in philox((seed, zlib.crc32(purpose.encode())), (block, step, sample, 0))
    ]
    return [(word >> 11) / 2**53 for word in words[:length]]


@few_examples
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 13))
def test_the_uniforms_are_philox_computed_by_hand(seed, step, sample, length):
    assert raw_uniforms(seed, "rollout", step, sample, length).tolist() == uniforms_by_hand(
        seed, "rollout", step, sample, length
    )


def test_the_literal_uniforms_of_a_stream_never_change():
    assert raw_uniforms(7, "rollout", 3, 5, 5).tolist() == LITERAL_UNIFORMS


def test_the_literal_permutation_of_a_stream_never_changes():
    assert permutation(7, "minibatches", 10, 3, 1).tolist() == LITERAL_PERMUTATION


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    alone = raw_uniforms(1, "rollout", 2, 3, 9)
    np.random.Generator(np.random.PCG64()).random()
    for other in ("rollout", "shuffle"):
        raw_uniforms(1, other, 9, 9, 100)
    torch.rand(3)
    assert raw_uniforms(1, "rollout", 2, 3, 9).tolist() == alone.tolist()
    assert raw_uniforms(1, "rollout", 2, 3, 4).tolist() == alone[:4].tolist()  # nor on how many are taken


def test_seed_purpose_and_every_counter_give_another_stream():
    calls = [(1, "a", 0, 0), (2, "a", 0, 0), (1, "b", 0, 0), (1, "a", 1, 0), (1, "a", 0, 1), (2**62, "a", 0, 0)]
    draws = [tuple(raw_uniforms(seed, purpose, step, sample, 4)) for seed, purpose, step, sample in calls]
    third = tuple(stream(1, "a", 0, 0, 1).random(4))
    assert len({*draws, third}) == len(calls) + 1


def test_neighbouring_streams_are_not_correlated_and_are_uniform():
    grid = np.stack([raw_uniforms(0, "rollout", 1, sample, 100) for sample in range(200)])
    assert grid.min() >= 0.0
    assert grid.max() < 1.0
    assert grid.mean() == pytest.approx(0.5, abs=4 * (1 / 12) ** 0.5 / 20_000**0.5)
    for a, b in pairwise(grid):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.45  # 4.5 standard deviations


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_huge_seeds_keep_all_their_digits(seed):
    assert raw_uniforms(seed, "a", 0, 0, 5).tolist() == uniforms_by_hand(seed, "a", 0, 0, 5)


@pytest.mark.parametrize(("seed", "counter"), [(-1, ()), (2**64, ()), (0, (-1,)), (0, (1, 2**64))])
def test_a_negative_or_too_large_seed_or_counter_raises_rather_than_wraps(seed, counter):
    with pytest.raises(OverflowError):
        stream(seed, "a", *counter)


def test_more_than_three_counters_are_refused():
    with pytest.raises(ValueError, match="at most three"):
        stream(0, "a", 1, 2, 3, 4)


def test_counter_uniforms_depend_on_a_rows_own_key_only():
    together = CounterUniforms(5, "rollout", 2, np.array([3, 1, 8]), 6)
    alone = CounterUniforms(5, "rollout", 2, np.array([8]), 6)
    longer = CounterUniforms(5, "rollout", 2, np.array([1, 8, 3, 4]), 9)
    for position in range(6):
        row = together.uniforms(position)
        assert row.dtype == torch.float64
        assert same_bits(row[2:], alone.uniforms(position))
        assert same_bits(row, longer.uniforms(position)[[2, 0, 1]])
    assert CounterUniforms(5, "rollout", 2, np.array([], dtype=int), 4).uniforms(0).shape == (0,)


def test_generator_uniforms_really_use_the_generator():
    def draw(seed):
        source = GeneratorUniforms(torch.Generator().manual_seed(seed), 4)
        return torch.stack([source.uniforms(position) for position in range(3)])

    first = draw(1)
    torch.manual_seed(99)
    assert same_bits(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert first.dtype == torch.float64
    assert first.unique().numel() == 12


@pytest.mark.parametrize("n", [0, 1, 2, 257])
def test_a_permutation_has_every_place_once(n):
    assert sorted(permutation(0, "a", n, 4).tolist()) == list(range(n))


def test_every_permutation_of_three_is_about_as_frequent():
    counts = np.unique([permutation(0, "a", 3, step) for step in range(3000)], axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.999


def draw_from_all_globals():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()  # noqa: NPY002


@pytest.mark.parametrize("gauss_is_cached", [False, True])
def test_the_state_of_the_global_generators_survives_a_round_trip(gauss_is_cached):
    set_all_seeds(3)
    if gauss_is_cached:  # both make normal numbers in pairs and keep the second
        random.gauss(0, 1)
        np.random.randn()  # noqa: NPY002
    state = {name: tensor.clone() for name, tensor in rng_state().items()}
    drawn = [draw_from_all_globals() for _ in range(3)]
    set_all_seeds(4)
    set_rng_state(state)
    assert [draw_from_all_globals() for _ in range(3)] == drawn


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_set_all_seeds_decides_what_every_global_generator_draws(seed):
    set_all_seeds(seed)
    first = draw_from_all_globals()
    set_all_seeds(seed)
    assert draw_from_all_globals() == first
    set_all_seeds(seed - 1 if seed else 1)
    assert not set(draw_from_all_globals()) & set(first)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
