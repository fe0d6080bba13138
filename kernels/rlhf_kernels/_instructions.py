"""Instructions of a program in the making: the columns of the arena, the places of matrices, lines for _program.pyx.

Shape suffixes: N tokens of all rows side by side, M of them that are read.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.nn import Parameter

from rlhf_kernels.dense import Activation, Norm, Rowwise

_native: Any
try:
    from rlhf_kernels.cpu import _program as _native
except ImportError:  # not built
    _native = None

_LANES = 16
TOKENS = -1
"""Stands in an instruction for the rows that its matrices have."""

ZERO, ARENA, COSINE, SINE, OTHERS = range(5)
"""Bases of places: address 0, the arena, the turns, and from there on gradients of parameters, or keys and values."""


class Place(NamedTuple):
    """Of a matrix: behind the address of a base, columns of N floats and single floats."""

    base: int
    columns: int = 0
    floats: int = 0

    def beside(self, floats: int) -> "Place":
        """Return the place so many columns to the right, those of a token lying side by side."""
        return Place(self.base, self.columns, self.floats + floats)


NOWHERE = Place(ZERO)


@dataclass(frozen=True)
class Matrix:
    """[N, width] or, of the tokens read, [M, width]: a result of a program's operator or its input."""

    number: int
    width: int
    read: bool = False


@dataclass
class Arena:
    """Where matrices lie: columns of N floats each, given back and taken again."""

    width: int = 0
    _free: list[tuple[int, int]] = field(default_factory=list)

    def take(self, width: int) -> int:
        """Return the first column of ``width`` that nobody has."""
        width = _rounded(width)
        for at, (first, free) in enumerate(self._free):
            if free >= width:
                self._free[at : at + 1] = [(first + width, free - width)] if free > width else []
                return first
        first = self._free.pop()[0] if self._free and sum(self._free[-1]) == self.width else self.width
        self.width = first + width
        return first

    def give(self, first: int, width: int) -> None:
        """Let others have columns again."""
        joined: list[tuple[int, int]] = []
        for at, free in sorted([*self._free, (first, _rounded(width))]):
            if joined and sum(joined[-1]) == at:
                joined[-1] = joined[-1][0], joined[-1][1] + free
            else:
                joined.append((at, free))
        self._free = joined


def _rounded(width: int) -> int:
    return -(-width // _LANES) * _LANES


class Code:
    """Instructions in the making, and the places of matrices."""

    def __init__(self, learned: Sequence[Parameter] = ()) -> None:
        self.arena = Arena()
        self.lines: list[list[int]] = []
        self.where: dict[int, int] = {}
        """The first column of a matrix, by its number."""
        self.moving: set[int] = set()
        """The numbers of the matrices that have a gradient."""
        self.gradients: dict[int, int] = {}
        """The first column of a matrix's gradient."""
        self._learned = {id(parameter): OTHERS + at for at, parameter in enumerate(learned)}

    def add(
        self, kind: int, places: Sequence[Place], numbers: Sequence[int], real: float = 0.0, *, read: bool = False
    ) -> None:
        """Write an instruction down, for the tokens that are read or for all."""
        line = [kind, struct.unpack("q", struct.pack("d", real))[0], read, *numbers]
        line += [0] * (_native.FIRST_PLACE - len(line))
        line += [number for place in places for number in place]
        self.lines.append(line + [0] * (_native.INSTRUCTION - len(line)))

    def place(self, matrix: Matrix) -> Place:
        """Where a matrix lies."""
        return in_arena(self.where[matrix.number])

    def weight(self, parameter: Tensor | None) -> Place:
        """Where a parameter lies."""
        return NOWHERE if parameter is None else Place(ZERO, floats=parameter.data_ptr() // parameter.element_size())

    def weight_gradient(self, parameter: Tensor | None) -> Place:
        """Where a parameter's gradient goes; nowhere if it has none."""
        at = self._learned.get(id(parameter))
        return NOWHERE if at is None else Place(at)

    def learns(self, *parameters: Tensor | None) -> bool:
        """Whether any of the parameters has a gradient."""
        return any(id(parameter) in self._learned for parameter in parameters)

    def moves(self, matrix: Matrix) -> bool:
        """Whether a matrix has a gradient."""
        return matrix.number in self.moving

    def add_gradient(self, matrix: Matrix, write: Callable[[Place], None]) -> None:
        """Let ``write`` put a gradient of a matrix somewhere, and add it to what there is."""
        first = self.arena.take(matrix.width)
        write(in_arena(first))
        self.hand_on(first, matrix)

    def hand_on(self, first: int, matrix: Matrix) -> None:
        """Make a gradient that nobody else needs any more a matrix's, or add it to that."""
        before = self.gradients.setdefault(matrix.number, first)
        if before != first:
            place = in_arena(before)
            self.add(_native.Kind.ADD, [place, in_arena(first), place], [matrix.width], read=matrix.read)
            self.arena.give(first, matrix.width)

    def rowwise(self, function: Rowwise, x: Matrix, parameters: Sequence[Tensor], out: Place) -> None:
        """Write down out = function(x)."""
        if isinstance(function, Norm):
            weight, bias = (*parameters, None)[:2]
            places = [self.place(x), self.weight(weight), self.weight(bias), out]
            self.add(_native.Kind.NORM, places, [x.width, function.centered], function.epsilon, read=x.read)
        else:
            numbers = [x.width, cast("Activation", function).kind]
            self.add(_native.Kind.ACTIVATION, [self.place(x), NOWHERE, out], numbers, read=x.read)

    def rowwise_gradients(
        self, function: Rowwise, x: Matrix, grad: Place, parameters: Sequence[Tensor], out: Place
    ) -> None:
        """Write down the gradient of x, and those of the parameters."""
        if isinstance(function, Norm):
            weight, bias = (*parameters, None)[:2]
            learned = [self.weight_gradient(weight), self.weight_gradient(bias)]
            places = [self.place(x), grad, self.weight(weight), out, *learned]
            self.add(_native.Kind.NORM_GRADIENTS, places, [x.width, function.centered], function.epsilon, read=x.read)
        else:
            numbers = [x.width, cast("Activation", function).kind]
            self.add(_native.Kind.ACTIVATION, [self.place(x), grad, out], numbers, read=x.read)


def in_arena(first: int) -> Place:
    """Return the place of a matrix whose first column is given."""
    return Place(ARENA, first)
