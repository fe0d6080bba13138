import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.batches import batches, prompt_rows, right_pad


def test_right_pad_fills_behind_and_masks_it():
    ids, mask = right_pad([[5, 6], [7], [8, 9, 3]], pad_id=0)
    assert ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 3]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)


class TestBatches:
    @given(st.integers(1, 80), st.integers(1, 9), st.integers(0, 5))
    def test_an_epoch_has_no_row_twice_and_drops_less_than_a_batch_a_pool(self, n, size, seed):
        lengths = [1 + (7 * row) % 13 for row in range(n)]
        size = min(size, n)
        per_epoch = sum(len(range(0, min(16 * size, n - start) - size + 1, size)) for start in range(0, n, 16 * size))
        stream = batches(lengths, size, seed, "test")
        for epoch in (list(itertools.islice(stream, per_epoch)) for _ in range(2)):
            rows = [row for batch in epoch for row in batch]
            assert all(len(batch) == size for batch in epoch)
            assert len(set(rows)) == len(rows) > n - size
            assert set(rows) <= set(range(n))

    def test_it_is_a_function_of_seed_and_purpose(self):
        lengths = list(range(1, 41))

        def first(seed, purpose):
            return list(itertools.islice(batches(lengths, 4, seed, purpose), 20))

        assert first(1, "a") == first(1, "a")
        assert first(1, "a") != first(2, "a")
        assert first(1, "a") != first(1, "b")

    def test_epochs_differ(self):
        stream = batches([1] * 40, 4, 0, "a")
        assert list(itertools.islice(stream, 10)) != list(itertools.islice(stream, 10))

    def test_rows_of_a_batch_have_similar_lengths(self):
        lengths = [1 + (37 * row) % 64 for row in range(64)]
        for batch in itertools.islice(batches(lengths, 4, 0, "a"), 16):
            spread = max(lengths[row] for row in batch) - min(lengths[row] for row in batch)
            assert spread == 3  # one pool holds all: 1 to 64, sorted, in fours

    def test_fewer_rows_than_a_batch_give_one_batch(self):
        assert sorted(next(batches([3, 1, 2], 8, 0, "a"))) == [0, 1, 2]


class TestPromptRows:
    @given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
    def test_successive_steps_go_through_one_permutation_after_the_other(self, n, size, seed):
        steps = range(1, 2 + 3 * n // size)
        rows = [row for step in steps for row in prompt_rows(n, size, step, seed)]
        for start in range(0, len(rows) - n + 1, n):
            assert sorted(rows[start : start + n]) == list(range(n))

    def test_a_step_is_a_function_of_its_number_and_the_seed(self):
        assert prompt_rows(50, 8, 7, 1) == prompt_rows(50, 8, 7, 1)
        assert prompt_rows(50, 8, 7, 1) != prompt_rows(50, 8, 7, 2)
        assert prompt_rows(50, 8, 7, 1) != prompt_rows(50, 8, 8, 1)

    def test_a_batch_may_be_longer_than_the_data(self):
        rows = prompt_rows(3, 7, 1, 0)
        assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
