"""Rows in batches: padding, and orders that are functions of the seed."""

from collections.abc import Iterator, Sequence

import torch

from rlhf_core.seeding import permutation


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, L] ids and attention mask, padded on the right."""
    width = max(map(len, sequences))
    ids = [[*sequence, *([pad_id] * (width - len(sequence)))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor(ids), torch.tensor(mask)


def batches(lengths: Sequence[int], batch_size: int, seed: int, purpose: str) -> Iterator[list[int]]:
    """Yield batches of row numbers for ever: each epoch is shuffled, and batches hold rows of similar length.

    Within an epoch, pools of 16 batches are sorted by length and their batches shuffled again, which leaves little
    padding and keeps batches random. What an epoch leaves over is dropped; fewer rows than a batch give one batch.
    """
    n = len(lengths)
    size = min(batch_size, n)
    epoch = 0
    while True:
        order = permutation(seed, purpose, n, epoch)
        pool_size = 16 * size
        pooled: list[list[int]] = []
        for start in range(0, n, pool_size):
            pool = sorted(order[start : start + pool_size].tolist(), key=lambda row: lengths[row])
            pooled += [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
        for place in permutation(seed, f"{purpose}/batches", len(pooled), epoch):
            yield pooled[place]
        epoch += 1


def prompt_rows(n_prompts: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows of step ``step`` (from 1): successive places of one shuffled epoch after the other."""
    first = (step - 1) * batch_size
    rows = []
    for place in range(first, first + batch_size):
        epoch, within = divmod(place, n_prompts)
        rows.append((epoch, within))
    orders = {epoch: permutation(seed, "prompts", n_prompts, epoch) for epoch in sorted({epoch for epoch, _ in rows})}
    return [int(orders[epoch][within]) for epoch, within in rows]
