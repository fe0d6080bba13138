"""`rlhf_kernels.memory`: memory serves again when what lay in it is gone, and goes back to the system in the end."""

import gc
import weakref

import pytest
import torch

from rlhf_kernels import memory
from rlhf_kernels.memory import LARGE, reusable, reused

SHAPE = torch.Size((LARGE // 4, 1))


@pytest.fixture
def made(monkeypatch):
    """Weak references to the memory that was asked of the system."""
    made, output = [], memory.output
    monkeypatch.setattr(memory, "output", lambda *what: made.append(weakref.ref(new := output(*what))) or new)
    return made


def address_of_a_passing_tensor(shape=SHAPE):
    return reusable(shape, torch.float32).data_ptr()


def test_memory_of_a_tensor_that_is_gone_is_that_of_the_next_of_its_size(made):
    with reused():
        first = address_of_a_passing_tensor()
        assert address_of_a_passing_tensor() == first
        assert reusable(SHAPE[:1], torch.float32).data_ptr() == first
        kept = reusable(SHAPE, torch.float32)
        assert kept.data_ptr() == first
        assert len(made) == 1
        assert reusable(SHAPE, torch.float32).data_ptr() != first  # that is in use
        assert len(made) == 2


def test_a_view_keeps_the_memory_from_being_given_on():
    with reused():
        view = reusable(SHAPE, torch.float32)[7:9]
        view.fill_(3.0)
        others = [reusable(SHAPE, torch.float32).fill_(1.0) for _ in range(3)]
        assert view.flatten().tolist() == [3.0, 3.0]
        assert all(other.data_ptr() != view.data_ptr() - 7 * 4 for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(2, LARGE), (3, 5), (0, 4), ()])
def test_tensors_are_as_asked_for_and_aligned(shape, dtype):
    with reused():
        for _ in range(2):
            tensor = reusable(torch.Size(shape), dtype)
            assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
            assert tensor.data_ptr() % 64 == 0 or tensor.numel() == 0


def test_what_fits_no_more_is_let_go(made):
    with reused():
        address_of_a_passing_tensor()
        assert made[0]() is not None
        address_of_a_passing_tensor(torch.Size((LARGE,)))
        gc.collect()
        assert made[0]() is None
        assert made[1]() is not None
    gc.collect()
    assert made[1]() is None


def test_without_it_memory_goes_back_to_the_system(made):
    for _ in range(2):
        assert reusable(SHAPE, torch.float32).shape == SHAPE
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_small_results_are_left_to_torch():
    with reused():
        small = reusable(torch.Size((LARGE // 4 - 1,)), torch.float32)
        del small
        assert memory._free == {}


def test_what_is_lent_outlives_the_reuse_and_an_error():
    lent = []

    @reused()
    def fail():
        lent.append(reusable(SHAPE, torch.float32).fill_(5.0))
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert memory._free is None
    assert bool((lent[0] == 5.0).all())


def test_one_in_another_has_the_same_memory(made):
    with reused():
        first = address_of_a_passing_tensor()
        with reused():
            assert address_of_a_passing_tensor() == first
        assert address_of_a_passing_tensor() == first
    assert len(made) == 1
