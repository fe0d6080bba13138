"""What a program can do to matrices: the instructions of each operator, forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.nn import Parameter

from rlhf_kernels._instructions import COSINE, NOWHERE, OTHERS, SINE, TOKENS, Code, Matrix, Place, in_arena
from rlhf_kernels.dense import Rowwise

_native: Any
try:
    from rlhf_kernels.cpu import _program as _native
except ImportError:  # not built
    _native = None


class Operation(Protocol):
    """Makes a matrix of matrices, with parameters."""

    @property
    def out(self) -> Matrix: ...
    @property
    def inputs(self) -> tuple[Matrix, ...]: ...
    @property
    def parameters(self) -> tuple[Parameter, ...]: ...
    @property
    def kept(self) -> tuple[Matrix, ...]:
        """What is made beside ``out`` and kept for the backward pass."""
        ...

    def forward(self, code: Code) -> None:
        """Write down how it is made."""
        ...

    def backward(self, code: Code, grad: int) -> None:
        """Write down the gradients of inputs and parameters; ``grad``, its own, is given back or handed on."""
        ...


@dataclass(frozen=True)
class EachRow:
    function: Rowwise
    x: Matrix
    parameters: tuple[Parameter, ...]
    out: Matrix
    kept: tuple[Matrix, ...] = ()

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        return (self.x,)

    def forward(self, code: Code) -> None:
        code.rowwise(self.function, self.x, self.parameters, code.place(self.out))

    def backward(self, code: Code, grad: int) -> None:
        code.add_gradient(
            self.x,
            lambda place: code.rowwise_gradients(self.function, self.x, in_arena(grad), self.parameters, place),
        )
        code.arena.give(grad, self.out.width)


@dataclass(frozen=True)
class Linear:
    x: Matrix
    weight: Parameter
    transposed: bool
    bias: Parameter | None
    before: Rowwise | None
    before_parameters: tuple[Parameter, ...]
    residual: Matrix | None
    out: Matrix
    kept: tuple[Matrix, ...] = ()

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (self.weight, *(() if self.bias is None else (self.bias,)), *self.before_parameters)

    @property
    def _strides(self) -> tuple[int, int]:
        """Of the weight [out, x], wherever its rows lie."""
        return (1, self.out.width) if self.transposed else (self.x.width, 1)

    def _rows_before(self, code: Code) -> tuple[Place, Callable[[], None]]:
        """Write down what comes before the product; return where it is, and what gives its place back."""
        if self.before is None:
            return code.place(self.x), lambda: None
        first = code.arena.take(self.x.width)
        code.rowwise(self.before, self.x, self.before_parameters, in_arena(first))
        return in_arena(first), lambda: code.arena.give(first, self.x.width)

    def forward(self, code: Code) -> None:
        rows, give_back = self._rows_before(code)
        residual = NOWHERE if self.residual is None else code.place(self.residual)
        by_out, by_x = self._strides
        places = [rows, code.weight(self.weight), code.weight(self.bias), residual, code.place(self.out)]
        numbers = [TOKENS, self.x.width, self.out.width, self.x.width, 1, by_x, by_out]
        code.add(_native.Kind.MULTIPLY, places, numbers, read=self.x.read)
        give_back()

    def backward(self, code: Code, grad: int) -> None:
        self._weight_gradient(code, in_arena(grad))
        if self.bias is not None and code.learns(self.bias):
            places = [in_arena(grad), code.weight_gradient(self.bias)]
            code.add(_native.Kind.COLUMN_SUMS, places, [self.out.width], read=self.x.read)
        if code.moves(self.x) or code.learns(*self.before_parameters):
            self._input_gradient(code, in_arena(grad))
        if self.residual is not None and code.moves(self.residual):
            code.hand_on(grad, self.residual)
        else:
            code.arena.give(grad, self.out.width)

    def _weight_gradient(self, code: Code, grad: Place) -> None:
        if not code.learns(self.weight):
            return
        rows, give_back = self._rows_before(code)
        ours, theirs = (rows, self.x.width), (grad, self.out.width)
        (left, height), (right, width) = (ours, theirs) if self.transposed else (theirs, ours)
        places = [left, right, NOWHERE, NOWHERE, code.weight_gradient(self.weight)]
        code.add(_native.Kind.MULTIPLY, places, [height, TOKENS, width, 1, height, width, 1], read=self.x.read)
        give_back()

    def _input_gradient(self, code: Code, grad: Place) -> None:
        by_out, by_x = self._strides

        def multiplied(place: Place) -> None:
            places = [grad, code.weight(self.weight), NOWHERE, NOWHERE, place]
            numbers = [TOKENS, self.out.width, self.x.width, self.out.width, 1, by_out, by_x]
            code.add(_native.Kind.MULTIPLY, places, numbers, read=self.x.read)

        before = self.before
        if before is None:
            code.add_gradient(self.x, multiplied)
            return
        first = code.arena.take(self.x.width)
        multiplied(in_arena(first))
        code.add_gradient(
            self.x,
            lambda place: code.rowwise_gradients(before, self.x, in_arena(first), self.before_parameters, place),
        )
        code.arena.give(first, self.x.width)


@dataclass(frozen=True)
class Gated:
    function: Rowwise
    gate: Matrix
    wide: Matrix
    out: Matrix
    parameters: tuple[Parameter, ...] = ()
    kept: tuple[Matrix, ...] = ()

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        return self.gate, self.wide

    def forward(self, code: Code) -> None:
        width, opened = self.gate.width, code.arena.take(self.gate.width)
        code.rowwise(self.function, self.gate, (), in_arena(opened))
        self._multiply(code, in_arena(opened), code.place(self.wide), code.place(self.out))
        code.arena.give(opened, width)

    def backward(self, code: Code, grad: int) -> None:
        width, opened = self.gate.width, code.arena.take(self.gate.width)
        code.rowwise(self.function, self.gate, (), in_arena(opened))
        code.add_gradient(
            self.wide,
            lambda place: self._multiply(code, in_arena(grad), in_arena(opened), place),
        )
        self._multiply(code, in_arena(grad), code.place(self.wide), in_arena(opened))
        code.add_gradient(
            self.gate,
            lambda place: code.rowwise_gradients(self.function, self.gate, in_arena(opened), (), place),
        )
        code.arena.give(opened, width)
        code.arena.give(grad, width)

    def _multiply(self, code: Code, one: Place, other: Place, product: Place) -> None:
        code.add(_native.Kind.TIMES, [one, other, product], [self.gate.width], read=self.gate.read)


@dataclass(frozen=True)
class Rotated:
    x: Matrix
    head_width: int
    out: Matrix
    parameters: tuple[Parameter, ...] = ()
    kept: tuple[Matrix, ...] = ()

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        return (self.x,)

    def forward(self, code: Code) -> None:
        self._turn(code, code.place(self.x), code.place(self.out), back=False)

    def backward(self, code: Code, grad: int) -> None:
        code.add_gradient(self.x, lambda place: self._turn(code, in_arena(grad), place, back=True))
        code.arena.give(grad, self.out.width)

    def _turn(self, code: Code, x: Place, out: Place, *, back: bool) -> None:
        numbers = [self.x.width // self.head_width, self.head_width, back]
        code.add(_native.Kind.ROTATE, [x, Place(COSINE), Place(SINE), out], numbers)


@dataclass(frozen=True)
class Selected:
    x: Matrix
    out: Matrix
    parameters: tuple[Parameter, ...] = ()
    kept: tuple[Matrix, ...] = ()

    @property
    def inputs(self) -> tuple[Matrix, ...]:
        return (self.x,)

    def forward(self, code: Code) -> None:
        code.add(_native.Kind.SELECT, [code.place(self.x), code.place(self.out)], [self.x.width])

    def backward(self, code: Code, grad: int) -> None:
        code.add_gradient(self.x, lambda place: code.add(_native.Kind.SPREAD, [in_arena(grad), place], [self.x.width]))
        code.arena.give(grad, self.out.width)


@dataclass(frozen=True)
class Attended:
    inputs: tuple[Matrix, ...]
    heads: int
    shared: int
    head_width: int
    scale: float
    layer: int
    softmax: Matrix
    out: Matrix
    parameters: tuple[Parameter, ...] = ()

    @property
    def kept(self) -> tuple[Matrix, ...]:
        return (self.softmax,)

    def _parts(self, firsts: Sequence[int]) -> tuple[list[Place], list[int]]:
        """Return where queries, keys and values are in matrices that begin there, and how far tokens are apart."""
        if len(self.inputs) == 3:
            return [in_arena(first) for first in firsts], [matrix.width for matrix in self.inputs]
        whole, width = in_arena(firsts[0]), self.head_width
        columns = 0, self.heads * width, (self.heads + self.shared) * width
        return [whole.beside(column) for column in columns], 3 * [self.inputs[0].width]

    @property
    def _shape(self) -> list[int]:
        return [self.heads, self.heads // self.shared, self.head_width]

    def forward(self, code: Code) -> None:
        places, strides = self._parts([code.where[matrix.number] for matrix in self.inputs])
        places += [code.place(self.out), code.place(self.softmax)]
        code.add(_native.Kind.ATTEND, places, [*strides, *self._shape], self.scale)

    def forward_cached(self, code: Code) -> None:
        """Write down how it is made of one more token of each row, whose keys and values go into a cache."""
        places, strides = self._parts([code.where[matrix.number] for matrix in self.inputs])
        caches = [Place(OTHERS + 2 * self.layer + which) for which in range(2)]
        numbers = [*strides, *self._shape]
        code.add(_native.Kind.ATTEND_CACHED, [*places, *caches, code.place(self.out)], numbers, self.scale)

    def backward(self, code: Code, grad: int) -> None:
        places, strides = self._parts([code.where[matrix.number] for matrix in self.inputs])
        firsts = [code.arena.take(matrix.width) for matrix in self.inputs]
        grads, _ = self._parts(firsts)
        numbers = [*strides, *self._shape, *strides]
        places += [in_arena(grad), code.place(self.softmax), *grads]
        code.add(_native.Kind.ATTEND_GRADIENTS, places, numbers, self.scale)
        for first, matrix in zip(firsts, self.inputs, strict=True):
            code.hand_on(first, matrix)
        code.arena.give(grad, self.out.width)
