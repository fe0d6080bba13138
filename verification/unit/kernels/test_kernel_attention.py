"""Attention row by row: against float64, and the same bits over a cache and over whole rows."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import rlhf_kernels

if "cython" not in rlhf_kernels.available_backends():
    pytest.skip("the Cython kernels are not built", allow_module_level=True)

from rlhf_kernels.attention import Cache, attend, attends
from rlhf_kernels.cpu import launch

SHAPES = [  # lengths of the rows, heads, key-value heads, head width
    ([5, 80, 33, 1], 4, 2, 16),
    ([7, 3], 2, 2, 8),
    ([40] * 3, 3, 3, 64),
    ([33, 20], 3, 1, 24),
    ([130], 2, 1, 80),
    ([1], 1, 1, 1),
]


def inputs(lengths, heads, shared, width, seed=0):
    """Query, key and value as parts of one matrix, as a model's joint projection makes them."""
    joint = torch.randn(sum(lengths), heads + 2 * shared, width, generator=torch.Generator().manual_seed(seed))
    return joint.split([heads, shared, shared], dim=1), torch.tensor([0, *lengths]).cumsum(0)


def in_float64(query, key, value, starts, scale):
    rows = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        parts = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        mixed = scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)
        rows.append(mixed[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize(("lengths", "heads", "shared", "width"), SHAPES)
def test_attention_and_its_gradient_are_those_of_float64(lengths, heads, shared, width):
    parts, starts = inputs(lengths, heads, shared, width)
    narrow, wide = ([x.detach().to(dtype).requires_grad_() for x in parts] for dtype in (torch.float32, torch.float64))
    ours, exact = attend(*narrow, starts, 0.3), in_float64(*wide, starts, 0.3)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=5e-6)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(ours, narrow, upstream), torch.autograd.grad(exact, wide, upstream.double())
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("lengths", "heads", "shared", "width"), SHAPES)
def test_a_token_over_a_cache_has_the_bits_of_the_token_in_its_row(lengths, heads, shared, width):
    (query, key, value), starts = inputs(lengths, heads, shared, width)
    whole = attend(query, key, value, starts, 0.3)
    rows = [row for row, length in enumerate(lengths) if length > 3] or [0]
    begun = torch.tensor([max(1, lengths[row] - 3) for row in rows])
    taken = torch.cat(
        [torch.arange(int(starts[row]), int(starts[row]) + n) for row, n in zip(rows, begun, strict=True)]
    )
    cache = Cache(key[taken], value[taken], torch.cat([begun.new_zeros(1), begun]).cumsum(0), 3)
    for step in range(3 if lengths[rows[0]] > 3 else 0):
        at = starts[torch.tensor(rows)] + begun + step
        found = cache.attend(query[at], key[at], value[at], begun + step, 0.3)
        assert torch.equal(found, whole[at])
        if step == 0 and len(rows) > 1:
            cache.keep(torch.tensor([1]))
            rows, begun = rows[1:2], begun[1:2]


def with_gradients(query, key, value, starts, scale, upstream):
    """The attention and its three gradients."""
    parts = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attend(*parts, starts, scale)
    return [out.detach(), *torch.autograd.grad(out, parts, upstream)]


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    parts, starts = inputs([90, 1, 200], 4, 2, 40)
    upstream = torch.randn(291, 4, 40, generator=torch.Generator().manual_seed(1))
    found, threads = [], torch.get_num_threads()
    try:
        for name in launch.usable_instruction_sets():
            for count in (1, 3):
                launch.use_instruction_set(name)
                torch.set_num_threads(count)
                found.append(with_gradients(*parts, starts, 0.2, upstream))
    finally:
        launch.use_instruction_set(None)
        torch.set_num_threads(threads)
    assert all(torch.equal(first, x) for other in found[1:] for first, x in zip(found[0], other, strict=True))


def test_a_row_and_its_gradients_have_the_same_bits_alone():
    parts, starts = inputs([21, 50, 9], 4, 2, 24)
    upstream = torch.randn(80, 4, 24, generator=torch.Generator().manual_seed(1))
    beside = with_gradients(*parts, starts, 0.2, upstream)
    alone = with_gradients(*(x[21:71] for x in parts), torch.tensor([0, 50]), 0.2, upstream[21:71])
    assert all(torch.equal(x[21:71], y) for x, y in zip(beside, alone, strict=True))


def test_what_comes_later_in_a_row_changes_no_gradient():
    (query, key, value), starts = inputs([30], 2, 1, 16)
    upstream = torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(1))
    upstream[20:] = 0.0
    spoiled = [torch.cat([x[:20], 1e6 * x[20:]]) for x in (query, key, value)]
    right, found = (with_gradients(*x, starts, 0.2, upstream) for x in ((query, key, value), spoiled))
    assert all(torch.equal(x[:20], y[:20]) for x, y in zip(right, found, strict=True))
    assert all(not x[20:].any() for x in found[1:])


def test_large_scores_neither_overflow_nor_vanish():
    (query, key, value), starts = inputs([20], 1, 1, 16)
    out = attend(query * 1e4, key * 1e4, value, starts, 1.0)
    exact = in_float64(query.double() * 1e4, key.double() * 1e4, value.double(), starts, 1.0)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


def test_a_full_cache_is_named_and_other_tensors_are_not_served():
    (query, key, value), starts = inputs([16], 1, 1, 4)
    cache = Cache(key, value, starts, 0)
    with pytest.raises(ValueError, match="room for 16 tokens a row, and a row has 17"):
        cache.attend(query[:1], key[:1], value[:1], torch.tensor([16]), 1.0)
    assert attends(query)
    assert not attends(query.double())
    assert not attends(query.bfloat16())
