"""The cases that properties are asked in, and how advantages are read back from what a step changed.

On a tabular policy one step of gradient descent at rate 1 changes the logits of prefix s by Σ A (e_a − π(·|s)) / (τ N)
over the N response tokens of the minibatch, where a is the token drawn at s and τ the temperature, and its value by
c (R − V) / N.

Shape suffixes: S prefixes, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf_core.testing.case import Case, Trainer, random_case
from rlhf_core.testing.world import World

T = TypeVar("T")
TOLERANCE = 1e-9
WORLD = World(vocabulary=4, length=3, prompts=((2,), (3, 2), (3, 1), (3, 3)))
"""One prompt is shorter than the others: with them in a batch it is padded on the left."""
FULL = ((1, 3, 2), (2, 2, 3), (3, 1, 1))
"""Responses that fill the length, the padding token among their tokens; none ended by itself."""
SHORT = ((1, 0), (2, 2, 3), (0,), (3, 1, 0))
"""Responses of unequal length, three of which ended."""
SCORES = (1.0 + 2.0**-20, -0.75, 2.5, 0.5)
"""float32 holds them; no narrower type does."""


def full_case(**settings: object) -> Case:
    """Three prompts of one length with full responses: no padding anywhere, and every prefix in one row only."""
    return random_case(WORLD, (1, 2, 3), FULL, SCORES[:3], **settings)


def short_case(**settings: object) -> Case:
    """Responses of unequal length, and one prompt that is padded."""
    return random_case(WORLD, (0, 1, 2, 3), SHORT, SCORES, **settings)


def without_values(case: Case) -> Case:
    """The case with every value 0, also behind the end."""
    return case.change(values_S=torch.zeros_like(case.values_S))


def without_kl(case: Case) -> Case:
    """The case with the reference equal to the policy."""
    return case.change(reference_SV=case.policy_SV)


def policy_change(case: Case, trainer: Trainer) -> Tensor:
    """Return [S, V] by how much the steps moved the policy's table."""
    return trainer(case).policy_SV - case.policy_SV


def value_change(case: Case, trainer: Trainer) -> Tensor:
    """Return [S] by how much the steps moved the values."""
    return trainer(case).values_S - case.values_S


def direction(case: Case, row: int, t: int) -> Tensor:
    """Return [V] e_a − π(·|s): where the logits of a row's prefix at token t go when that token is reinforced."""
    state = case.states(row)[t]
    e_V = torch.nn.functional.one_hot(torch.tensor(case.responses[row][t]), case.world.vocabulary)
    return e_V - torch.softmax(case.policy_SV[state] / case.temperature, dim=0)


def read_advantages(case: Case, change_SV: Tensor) -> list[list[float]]:
    """Return A / (τ N) of each token, by projecting each prefix's change on its direction."""
    return [
        [
            float(change_SV[state] @ direction(case, row, t) / direction(case, row, t).square().sum())
            for t, state in enumerate(case.states(row))
        ]
        for row in range(len(case.prompts))
    ]


def read_flat(case: Case, trainer: Trainer) -> list[float]:
    """Return A / (τ N) of all tokens, one row's after the other's."""
    return flat(read_advantages(case, policy_change(case, trainer)))


def close(found: Tensor | list[float] | float, expected: Tensor | list[float] | float) -> None:
    """Fail unless two arrays agree to the tolerance, relative to the larger of 1 and what was expected."""
    a, b = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in (found, expected)))
    scale = max(1.0, float(b.abs().max()))
    off = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    worst = float(off.max())
    if worst > TOLERANCE * scale:
        raise AssertionError(f"off by {worst:.3g}: {_worst(a, b, off, scale)}{rounding(worst, scale)}")


def _worst(a: Tensor, b: Tensor, off: Tensor, scale: float) -> str:
    """Return the cells of largest difference, by their indices, and how many differ."""
    if off.dim() == 0:
        return f"found {float(a):.9g}, expected {float(b):.9g}"
    wrong = int((off > TOLERANCE * scale).sum())
    places = off.flatten().argsort(descending=True, stable=True)[: min(wrong, 3)].tolist()
    cells = [
        f"{[int(at) for at in np.unravel_index(place, off.shape)]} is {float(a.flatten()[place]):.9g}, "
        f"expected {float(b.flatten()[place]):.9g}"
        for place in places
    ]
    return f"{'; '.join(cells)} ({wrong} of {off.numel()} differ)"


def parallel(found: Tensor | list[float], expected: Tensor | list[float]) -> None:
    """Fail unless two arrays point the same way, whatever their lengths; neither may be zero."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    if float(a.norm()) < TOLERANCE:
        raise AssertionError("nothing moved")
    close(a / a.norm(), b / b.norm())


def rounding(difference: float, scale: float = 1.0) -> str:
    """Return what to add to a message where float32's rounding, 2^-24 of each number, may be all there is."""
    if difference > 2.0**-18 * scale:
        return ""
    return ": the size of float32's rounding; train in float64, as under rlhf_core.testing.world.double_precision()"


def ask_each(ask: Callable[[T], None], choices: Iterable[T]) -> None:
    """Ask for each choice; what the trainer refuses is refused when all the others have been asked.

    Raises:
        NotImplementedError: the trainer does not have one of them; the reasons.
    """
    refused = []
    for choice in choices:
        try:
            ask(choice)
        except NotImplementedError as error:
            refused.append(str(error))
    if refused:
        raise NotImplementedError("; ".join(filter(None, dict.fromkeys(refused))))


def flat(rows: list[list[float]]) -> list[float]:
    """Return the numbers of all rows."""
    return [x for row in rows for x in row]


def rows(case: Case) -> range:
    """Return the rows of a case."""
    return range(len(case.prompts))


def follows_directions(case: Case, change_SV: Tensor) -> None:
    """Fail unless every prefix of the batch moved along its direction, by whatever size and sign."""
    for row in rows(case):
        for t, state in enumerate(case.states(row)):
            size = float(change_SV[state] @ direction(case, row, t) / direction(case, row, t).square().sum())
            close(change_SV[state], size * direction(case, row, t))
