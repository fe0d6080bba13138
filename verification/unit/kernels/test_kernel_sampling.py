import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import kept_tokens, logp_and_entropy, same_bits
from scipy.stats import chisquare

from rlhf_kernels import available_backends, sample_tokens, token_logprobs

NATIVE = [name for name in available_backends() if name not in ("reference", "cuda")]
FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.8},
    {"top_k": 9, "top_p": 0.5, "temperature": 1.7},
    {"top_p": 1e-9},
]


def expected_draw(logits_row, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """The id, its log-probability among the kept tokens, and how far the uniform is from a border between tokens."""
    kept = kept_tokens(logits_row, temperature, top_k, top_p)
    cumulative = np.cumsum(list(kept.values()))
    index = min(int((cumulative <= uniform).sum()), len(kept) - 1)
    token = list(kept)[index]
    inner_borders = cumulative[:-1]
    distance = np.abs(inner_borders - uniform).min() if len(inner_borders) else 1.0
    return token, math.log(kept[token]), distance


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(41, 401), (3, 1271), (5, 1), (0, 9), (40, 2), (2, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draws_what_the_inverted_distribution_says(backend, rows, vocabulary, options, dtype):
    logits, uniforms = (torch.randn(rows, vocabulary) * 2).to(dtype), torch.rand(rows, dtype=torch.float64)
    drawn = sample_tokens(logits, uniforms, backend=backend, **options)
    assert drawn.ids.dtype == torch.int64
    assert drawn.logprobs.dtype == drawn.filtered_logprobs.dtype == torch.float32
    unfiltered, _ = logp_and_entropy(logits, drawn.ids, options.get("temperature", 1.0))
    torch.testing.assert_close(drawn.logprobs.double(), unfiltered, rtol=1e-6, atol=1e-5)
    for row in range(rows):
        token, filtered, distance = expected_draw(logits[row], float(uniforms[row]), **options)
        if distance > 1e-5:
            assert int(drawn.ids[row]) == token
            assert float(drawn.filtered_logprobs[row]) == pytest.approx(filtered, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", FILTERS)
def test_log_probabilities_are_the_trainers_to_the_bit(backend, options, dtype):
    logits = (torch.randn(50, 3001) * 3).to(dtype)
    drawn = sample_tokens(logits, torch.rand(50), backend=backend, **options)
    recomputed = token_logprobs(logits, drawn.ids, temperature=options.get("temperature", 1.0), backend=backend)
    assert same_bits(drawn.logprobs, recomputed)
    if not {"top_k", "top_p"} & options.keys():
        assert same_bits(drawn.filtered_logprobs, drawn.logprobs)


@pytest.mark.parametrize("options", FILTERS)
def test_frequencies_pass_a_chi_square_test(backend, options):
    draws = 40_000
    row = torch.randn(24) * 1.5
    generator = torch.Generator().manual_seed(11)
    uniforms = torch.rand(draws, dtype=torch.float64, generator=generator)
    ids = sample_tokens(row.expand(draws, -1), uniforms, backend=backend, **options).ids
    kept = kept_tokens(row, options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0))
    counts = np.bincount(ids.numpy(), minlength=24)
    assert set(np.flatnonzero(counts)) <= set(kept)
    observed = [counts[i] for i in kept]
    expected = [p * draws for p in kept.values()]
    if len(kept) > 1:
        assert chisquare(observed, expected).pvalue > 1e-4


def test_the_extreme_uniforms_give_the_first_and_the_last_possible_token(backend):
    logits = torch.randn(4, 5000)
    logits[:, :2100] = -math.inf
    logits[:, 4090:] = -math.inf
    logits[1, 2100] = -1e4  # no mass left in float32
    largest = torch.tensor([0.0, 0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-24], dtype=torch.float64)
    ids = sample_tokens(logits, largest, backend=backend).ids.tolist()
    assert ids[0] == 2100
    assert ids[1] == 2101
    assert ids[2] == 4089
    assert 4080 <= ids[3] <= 4089


@given(st.integers(1, 3000), st.integers(0, 2**31), st.sampled_from(FILTERS))
@settings(max_examples=40, deadline=None)
def test_never_draws_a_token_of_no_probability(vocabulary, seed, options):
    torch.manual_seed(seed)
    logits = torch.randn(8, vocabulary) * 4
    logits[torch.rand(8, vocabulary) < 0.8] = -math.inf
    logits[:, seed % vocabulary] = 0.0
    uniforms = torch.tensor([0.0, 1.0 - 2.0**-53, 0.5, 1e-300, 0.25, 0.75, 0.999999, 1e-9], dtype=torch.float64)
    drawn = sample_tokens(logits, uniforms, **options)
    assert logits.gather(-1, drawn.ids[:, None]).isfinite().all()
    assert drawn.filtered_logprobs.isfinite().all()
    assert (drawn.filtered_logprobs >= drawn.logprobs).all()


@pytest.mark.parametrize(
    ("options", "kept"), [({"top_k": 3}, {0, 1, 3}), ({"top_p": 0.55}, {0, 1, 3}), ({"top_k": 1}, {1})]
)
def test_equal_logits_at_the_border_go_to_the_lower_id(backend, options, kept):
    logits = torch.tensor([0.0, 1.0, -9.0, 0.0, 0.0, -0.0, 0.0]).expand(200, -1)
    ids = sample_tokens(logits, torch.linspace(0, 0.999, 200), backend=backend, **options).ids
    assert set(ids.tolist()) == kept


@pytest.mark.parametrize("name", NATIVE)
def test_the_border_is_right_where_many_logits_share_their_leading_bits(name):
    logits = 1.0 + torch.randperm(4000).float().mul(2.0**-23).expand(3, -1)  # neighbours in float32
    for top_k in (1, 17, 1000, 3999):
        drawn = sample_tokens(logits, torch.tensor([0.0, 0.4, 0.999]), top_k=top_k, backend=name)
        kept = set(torch.topk(logits[0], top_k).indices.tolist())
        assert set(drawn.ids.tolist()) <= kept
        assert drawn.filtered_logprobs.tolist() == pytest.approx([-math.log(top_k)] * 3, abs=1e-3)


def test_a_row_does_not_depend_on_the_rows_beside_it(backend):
    logits, uniforms = torch.randn(30, 2500), torch.rand(30, dtype=torch.float64)
    together = sample_tokens(logits, uniforms, top_p=0.9, backend=backend)
    for row in (0, 13, 29):
        alone = sample_tokens(logits[row : row + 1], uniforms[row : row + 1], top_p=0.9, backend=backend)
        assert int(alone.ids[0]) == int(together.ids[row])


def test_takes_non_contiguous_logits_and_ones_that_require_a_gradient(backend):
    logits, uniforms = torch.randn(200, 9), torch.rand(9)
    dense = sample_tokens(logits.t().contiguous(), uniforms, backend=backend)
    strided = sample_tokens(logits.t().requires_grad_(), uniforms, backend=backend)
    assert torch.equal(dense.ids, strided.ids)
    assert not strided.logprobs.requires_grad


def test_refuses_bad_arguments_with_value_and_position(backend):
    logits, uniforms = torch.randn(3, 5), torch.rand(3)
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"uniform .* of row 1 is outside \[0, 1\)"):
            sample_tokens(logits, torch.tensor([0.5, bad, 0.1]), backend=backend)
    for bad in (math.nan, math.inf, -math.inf):
        broken = logits.clone()
        broken[2] = torch.tensor([bad] * 5)
        with pytest.raises(ValueError, match="row 2 are no distribution"):
            sample_tokens(broken, uniforms, backend=backend)
    with pytest.raises(ValueError, match="top_k is -1"):
        sample_tokens(logits, uniforms, top_k=-1, backend=backend)
    for top_p in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="top_p is"):
            sample_tokens(logits, uniforms, top_p=top_p, backend=backend)
    with pytest.raises(ValueError, match="temperature is 0"):
        sample_tokens(logits, uniforms, temperature=0.0, backend=backend)
    with pytest.raises(ValueError, match=r"uniforms must have shape \(3,\)"):
        sample_tokens(logits, uniforms[:2], backend=backend)
    with pytest.raises(ValueError, match="empty vocabulary"):
        sample_tokens(torch.empty(3, 0), uniforms, backend=backend)
