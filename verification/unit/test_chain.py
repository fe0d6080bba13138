import pytest
import torch
from torch import nn

from rlhf_core.chain import Chain, do_at_once
from rlhf_core.layers import Projection, exchange_layers
from rlhf_kernels.products import available

native = pytest.mark.skipif(not available(), reason="no native products on this processor")


def test_done_at_once_is_what_the_operator_returns():
    assert torch.equal(do_at_once(torch.add, torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_again_does_the_whole_chain_to_what_is_in_its_inputs_then():
    chain, x = Chain(), torch.tensor([1.0, 2.0])
    squares = chain.do(torch.square, x)
    total = chain.do(torch.sum, squares.view(1, 2))  # a view: what lies under it is renewed
    assert total.item() == 5.0
    x.copy_(torch.tensor([3.0, 4.0]))
    assert total.item() == 5.0
    chain.again()
    assert squares.tolist() == [9.0, 16.0]
    assert total.item() == 25.0


class Doubling:
    """Says beforehand what it will do, where its input is long enough."""

    def __init__(self):
        self.called = 0

    def __call__(self, x):
        self.called += 1
        return 2 * x

    def prepared(self, x):
        if len(x) < 2:
            return None
        out = torch.full_like(x, torch.nan)
        return out, [lambda: torch.mul(x, 2.0, out=out)]


@pytest.mark.parametrize("length", [1, 3])
def test_what_can_say_beforehand_is_not_called_again_and_what_cannot_is(length):
    chain, operator, x = Chain(), Doubling(), torch.ones(length)
    doubled = chain.do(operator, x)
    assert doubled.tolist() == [2.0] * length
    x.fill_(5.0)
    chain.again()
    assert doubled.tolist() == [10.0] * length
    assert operator.called == (2 if length == 1 else 0)


@native
@pytest.mark.parametrize("before", [None, nn.LayerNorm(8)])
def test_a_projection_written_down_has_the_bits_of_one_done_at_once(before):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(8, 5), *([] if before is None else [before])])
    exchange_layers(layers)
    projection, chain = Projection(layers[0], before=before), Chain()
    x, residual = torch.randn(3, 8), torch.randn(3, 5)
    with torch.no_grad():
        assert projection.prepared(x, residual) is not None
        y = chain.do(projection, x, residual)
        for _ in range(3):
            x.copy_(torch.randn(3, 8))
            residual.copy_(torch.randn(3, 5))
            chain.again()
            assert torch.equal(y, projection(x, residual))


@native
def test_memory_that_a_written_call_reads_is_not_given_away():
    """Nothing but the chain knows the norm's result, which the product reads."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(1000, 1000), nn.LayerNorm(1000)])
    exchange_layers(layers)
    projection, chain, x = Projection(layers[0], before=layers[1]), Chain(), torch.randn(4, 1000)
    with torch.no_grad():
        y, expected = chain.do(projection, x), projection(x)
        taken = [torch.full((4, 1000), torch.nan) for _ in range(50)]  # would lie where freed memory was
        chain.again()
    assert len(taken) == 50
    assert torch.equal(y, expected)


@native
def test_what_does_not_lie_side_by_side_is_copied_anew_each_time_and_not_once():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(8, 5), nn.LayerNorm(8)])
    exchange_layers(layers)
    projection, x, residual = Projection(layers[0], before=layers[1]), torch.randn(8, 3).t(), torch.randn(5, 3).t()
    with torch.no_grad():
        for inputs in ((x,), (x.contiguous(), residual), (x, residual)):
            assert projection.prepared(*inputs) is None
            chain = Chain()
            y = chain.do(projection, *inputs)
            inputs[-1].copy_(torch.randn(inputs[-1].shape))
            chain.again()
            assert torch.equal(y, projection(*inputs))
