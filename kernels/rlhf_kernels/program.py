"""The blocks of a transformer as a program: said once, and carried out in one native call, forward and backward.

An operator at a time takes longer to say than to compute in a small model: to look at shapes and dtypes, to make room
for a result, to make and save what autograd asks for. A :class:`Program` is told what there is to do to N tokens side
by side; it writes down the instructions, backward pass included, and where in one piece of memory, the arena, each
matrix lies. Its operators are those of :mod:`rlhf_kernels.products`, :mod:`rlhf_kernels.dense` and
:mod:`rlhf_kernels.attention`, and its bits theirs. Float32 on the CPU.

Shape suffixes: N tokens of all rows side by side, M of them that are read in the end, D width, H heads, G key-value
heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from rlhf_kernels import arenas
from rlhf_kernels._instructions import Code, Matrix
from rlhf_kernels._operations import Attended, EachRow, Gated, Linear, Operation, Rotated, Selected
from rlhf_kernels.attention import Cache, attends
from rlhf_kernels.dense import Rowwise
from rlhf_kernels.memory import reusable
from rlhf_kernels.native import differentiable_once, refuse_tangents, shown_as
from rlhf_kernels.products import multiplies

__all__ = ["Matrix", "Program", "Step", "Turns", "heads_in", "programmable"]

_native: Any
try:
    from rlhf_kernels.cpu import _program as _native
    from rlhf_kernels.cpu import launch
except ImportError:  # not built
    _native = None

Turns = tuple[Tensor, Tensor]
"""Cosine and sine [N, K] of the angles by which :meth:`Program.rotated` turns each token."""


class _Layout(NamedTuple):
    """How the tokens of a run lie: where rows begin (over caches, how long they are), their turns, which are read."""

    starts: Tensor
    turns: Turns | None
    read_M: Tensor


@dataclass(frozen=True)
class _Finished:
    """Instructions, the columns of the arena that they need, and where in it some matrices are."""

    lines: NDArray[np.int64]
    columns: int
    where: dict[int, int]
    incoming: int = 0
    """Of a backward pass: the first column of the gradient it begins with."""
    outgoing: int | None = None
    """Of a backward pass: the first column of the input's gradient."""


def _finished(code: Code, incoming: int = 0, outgoing: int | None = None) -> _Finished:
    lines = np.array(code.lines, dtype=np.int64).reshape(len(code.lines), _native.INSTRUCTION)
    return _Finished(lines, code.arena.width, code.where, incoming, outgoing)


class Program:
    """What there is to do to a matrix [N, D]: its methods say it, and return the matrices to come.

    The last matrix said is the result. What is made of :meth:`selected` matrices has M rows, not N. Parameters are
    float32, contiguous and stay where they are.
    """

    def __init__(self, width: int) -> None:
        """Begin with an input of a width."""
        self.input = Matrix(0, width)
        self._operations: list[Operation] = []
        self._matrices, self._layers = 1, 0
        # Threads may write the same down at the same time; then one of the equal results stays.
        self._pass: dict[Any, _Finished] = {}
        self._pass_and_back: dict[Any, tuple[_Finished, _Finished]] = {}

    # -- what there is to do -------------------------------------------------------------------------------------------

    def rowwise(self, function: Rowwise, x: Matrix, *parameters: Parameter) -> Matrix:
        """Return the function of each row."""
        return self._add(EachRow(function, x, parameters, self._new(x.width, x.read)))

    def linear(
        self,
        x: Matrix,
        weight: Parameter,
        bias: Parameter | None,
        *,
        transposed: bool = False,
        before: Rowwise | None = None,
        parameters: tuple[Parameter, ...] = (),
        residual: Matrix | None = None,
    ) -> Matrix:
        """Return residual + f(x) Wᵀ + b; f(x) is not kept for the backward pass.

        Args:
            x: [N, K].
            weight: W [out, K] or, if ``transposed``, Wᵀ [K, out].
            bias: [out].
            transposed: as said.
            before: f, by default nothing.
            parameters: of f.
            residual: [N, out].
        """
        _require_equal_rows(x, *(() if residual is None else (residual,)))
        out = self._new(weight.shape[1 if transposed else 0], x.read)
        return self._add(Linear(x, weight, transposed, bias, before, parameters, residual, out))

    def gated(self, function: Rowwise, gate: Matrix, wide: Matrix) -> Matrix:
        """Return function(gate) · wide, element by element, of a function without parameters."""
        _require_equal_rows(gate, wide)
        return self._add(Gated(function, gate, wide, self._new(wide.width, wide.read)))

    def rotated(self, x: Matrix, head_width: int) -> Matrix:
        """Return each head of a token turned by the angles given with the run; the halves of a head are paired.

        Su et al., "RoFormer" (2021), section 3.2.2.
        """
        _require_all_tokens(x)
        return self._add(Rotated(x, head_width, self._new(x.width, x.read)))

    def attended(
        self, matrices: tuple[Matrix, ...], heads: int, key_value_heads: int, head_width: int, scale: float
    ) -> Matrix:
        """Return [N, H · K] what each query of a layer sees in its row up to itself.

        Args:
            matrices: queries, keys and values, or one matrix with them side by side.
            heads: H.
            key_value_heads: G.
            head_width: K.
            scale: of the scores.
        """
        _require_all_tokens(*matrices)
        layer, self._layers = self._layers, self._layers + 1
        softmax, out = self._new(2 * heads), self._new(heads * head_width)
        return self._add(Attended(matrices, heads, key_value_heads, head_width, scale, layer, softmax, out))

    def selected(self, x: Matrix) -> Matrix:
        """Return [M, D] the rows of the tokens that are read in the end, which a run names."""
        _require_all_tokens(x)
        return self._add(Selected(x, self._new(x.width, read=True)))

    def _new(self, width: int, read: bool = False) -> Matrix:
        self._matrices += 1
        return Matrix(self._matrices - 1, width, read)

    def _add(self, operation: Operation) -> Matrix:
        self._operations.append(operation)
        return operation.out

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Those of all operators, in their order."""
        return tuple(parameter for operation in self._operations for parameter in operation.parameters)

    @property
    def output(self) -> Matrix:
        """What the last operator returned."""
        return self._operations[-1].out

    def floats_a_token(self) -> int:
        """Return how many float32 values of a token are held while all parameters learn."""
        return self._keeping(self.parameters, True)[1].columns

    # -- doing it ------------------------------------------------------------------------------------------------------

    def run(self, x_ND: Tensor, starts: Tensor, turns: Turns | None = None, read_M: Tensor | None = None) -> Tensor:
        """Return the result for an input, differentiable once in it and in the parameters.

        Args:
            x_ND: the input.
            starts: [B + 1] int64, where each row begins, and N.
            turns: for :meth:`rotated`.
            read_M: int64, for :meth:`selected`, each token at most once; by default all.

        Raises:
            IndexError: a token that is read is none of the N.
            RuntimeError: the input or a parameter has a tangent of forward-mode differentiation.
        """
        layout = _Layout(starts, turns, torch.arange(len(x_ND), device="cpu") if read_M is None else read_M)
        parameters = self.parameters
        refuse_tangents(x_ND, *parameters)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_ND, *parameters)):
            return cast("Tensor", _Run.apply(self, x_ND, layout, *parameters))
        code = self._passing()
        with arenas.lent(code.columns * len(x_ND)) as arena:
            return self._carried_out(code, arena, x_ND, layout)

    def run_into_caches(
        self, x_ND: Tensor, starts: Tensor, turns: Turns | None, more: int, read_M: Tensor
    ) -> tuple[Tensor, list[Cache]]:
        """Return what :meth:`run` does, without a gradient, and each layer's keys and values.

        Those have room for ``more`` tokens of a row.
        """
        refuse_tangents(x_ND, *self.parameters)
        attended = [operation for operation in self._operations if isinstance(operation, Attended)]
        code = self._passing(frozenset(matrix.number for one in attended for matrix in one.inputs))
        tokens, caches = len(x_ND), []
        with arenas.lent(code.columns * tokens) as arena:
            out = self._carried_out(code, arena, x_ND, _Layout(starts, turns, read_M))
            for one in attended:
                matrices = [_matrix(arena, code.where[each.number], tokens, each.width) for each in one.inputs]
                _, key_NGK, value_NGK = heads_in(matrices, one.heads, one.shared, one.head_width)
                caches.append(Cache(key_NGK, value_NGK, starts, more))
        return out, caches

    def over(self, caches: list[Cache], rows: int) -> "Step":
        """Return what reads one more token of each row, with attention over caches."""
        return Step(self, self._passing(cached=True), caches, rows)

    def _carried_out(self, code: _Finished, arena: Tensor, x_ND: Tensor, layout: _Layout) -> Tensor:
        tokens = len(x_ND)
        _matrix(arena, code.where[0], tokens, self.input.width).copy_(x_ND)
        _do(code, arena, tokens, layout)
        rows = len(layout.read_M) if self.output.read else tokens
        return _matrix(arena, code.where[self.output.number], tokens, self.output.width, rows).clone()

    # -- writing it down -----------------------------------------------------------------------------------------------

    def _passing(self, lasting: frozenset[int] = frozenset(), *, cached: bool = False) -> _Finished:
        """The forward pass, in which a matrix lies where others lay that nobody reads any more, unless those last."""
        key = lasting, cached
        if key not in self._pass:
            code = Code()
            last = {matrix.number: at for at, one in enumerate(self._operations) for matrix in one.inputs}
            code.where[0] = code.arena.take(self.input.width)
            for at, operation in enumerate(self._operations):
                for matrix in (operation.out, *operation.kept):
                    code.where[matrix.number] = code.arena.take(matrix.width)
                if cached and isinstance(operation, Attended):
                    operation.forward_cached(code)
                else:
                    operation.forward(code)
                over = [one for one in dict.fromkeys(operation.inputs) if last[one.number] == at]
                for matrix in (*operation.kept, *over):
                    if matrix.number not in lasting:
                        code.arena.give(code.where[matrix.number], matrix.width)
            self._pass[key] = _finished(code)
        return self._pass[key]

    def _keeping(self, learned: tuple[Parameter, ...], through_input: bool) -> tuple[_Finished, _Finished]:
        """The forward pass that keeps every matrix, and the backward pass for these parameters."""
        key = tuple(map(id, learned)), through_input
        if key not in self._pass_and_back:
            code = Code(learned)
            code.where[0] = code.arena.take(self.input.width)
            for matrix in [matrix for operation in self._operations for matrix in (operation.out, *operation.kept)]:
                code.where[matrix.number] = code.arena.take(matrix.width)
            for operation in self._operations:
                operation.forward(code)
            forward = _finished(code)
            code.lines = []
            code.moving = {0} if through_input else set()
            for operation in self._operations:
                if code.learns(*operation.parameters) or any(map(code.moves, operation.inputs)):
                    code.moving.add(operation.out.number)
            incoming = code.gradients[self.output.number] = code.arena.take(self.output.width)
            for operation in reversed(self._operations):
                if code.moves(operation.out):
                    code.arena.give(code.where[operation.out.number], operation.out.width)  # its readers are done
                    operation.backward(code, code.gradients.pop(operation.out.number))
                    for matrix in operation.kept:
                        code.arena.give(code.where[matrix.number], matrix.width)
            self._pass_and_back[key] = forward, _finished(code, incoming, code.gradients.get(0))
        return self._pass_and_back[key]


def _require_all_tokens(*matrices: Matrix) -> None:
    if any(matrix.read for matrix in matrices):
        raise ValueError("this needs all tokens of a row; say it before some are selected")


def _require_equal_rows(*matrices: Matrix) -> None:
    if len({matrix.read for matrix in matrices}) > 1:
        raise ValueError("one of these has all tokens and the other those that are selected; select in both")


def heads_in(
    matrices: Sequence[Tensor], heads: int, key_value_heads: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [N, H, K], key and value [N, G, K] in three matrices, or in one with them side by side."""
    split = [matrix.view(len(matrix), -1, head_width) for matrix in matrices]
    if len(split) == 1:
        split = list(split[0].split([heads, key_value_heads, key_value_heads], dim=1))
    query_NHK, key_NGK, value_NGK = split
    return query_NHK, key_NGK, value_NGK


def _matrix(arena: Tensor, first: int, tokens: int, width: int, rows: int | None = None) -> Tensor:
    """[tokens, width], or with fewer rows, from a column of the arena on."""
    return arena[first * tokens :][: width * (tokens if rows is None else rows)].view(-1, width)


def _do(
    code: _Finished,
    arena: Tensor,
    tokens: int,
    layout: _Layout,
    others: Sequence[Tensor | None] = (),
    room: int | None = None,
) -> None:
    """Carry out; ``others`` are gradients of parameters, or keys and values of caches of that room."""
    cosine, sine = (0, 0) if layout.turns is None else (launch.address(turn) for turn in layout.turns)
    bases = [
        0,
        launch.address(arena),
        cosine,
        sine,
        *(0 if other is None else launch.address(other) for other in others),
    ]
    rows = len(layout.starts) - (room is None)
    with shown_as("program"):
        _native.run(
            code.lines, np.array(bases), tokens, rows, launch.address(layout.starts), layout.read_M.numpy(), room or 0,
            launch.threads(), launch.instruction_set(),
        )  # fmt: skip


class Step:
    """Reads one more token of each row, in memory that it keeps."""

    def __init__(self, program: Program, code: _Finished, caches: list[Cache], rows: int) -> None:
        self._code, self._caches, self._rows = code, caches, rows
        self._all = torch.arange(rows, device="cpu")
        self._arena = arenas.new(code.columns * rows)
        self._x_BD = _matrix(self._arena, code.where[0], rows, program.input.width)
        self._out_BD = _matrix(self._arena, code.where[program.output.number], rows, program.output.width)

    def __call__(self, x_BD: Tensor, lengths_B: Tensor, turns: Turns | None = None) -> Tensor:
        """Return [B, D] the results, which the next call overwrites; ``lengths_B`` are from before."""
        refuse_tangents(x_BD)  # which the arena would keep, and hand to others
        self._x_BD.copy_(x_BD)
        others = [tensor for cache in self._caches for tensor in (cache.keys, cache.values_BGSK)]
        room = self._caches[0].values_BGSK.shape[2]
        _do(self._code, self._arena, self._rows, _Layout(lengths_B, turns, self._all), others, room)
        return self._out_BD


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, x_ND: Tensor, layout: _Layout, *parameters: Tensor) -> Tensor:
        learned = tuple(cast("Parameter", parameter) for parameter in parameters if parameter.requires_grad)
        forward, backward = program._keeping(learned, x_ND.requires_grad)
        ctx.program, ctx.code, ctx.layout, ctx.tokens = program, backward, layout, len(x_ND)
        ctx.arena = arenas.take(backward.columns * len(x_ND))
        ctx.save_for_backward(*learned)  # so that autograd sees when they change before the backward pass
        return program._carried_out(forward, ctx.arena, x_ND, layout)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        learned, code, arena, tokens = ctx.saved_tensors, ctx.code, ctx.arena, ctx.tokens
        if arena is None:
            raise RuntimeError("what was kept for the backward pass is gone after the first; run forward again")
        _matrix(arena, code.incoming, tokens, grad.shape[1], len(grad)).copy_(grad)
        grads = [reusable(parameter.shape, parameter.dtype) for parameter in learned]
        _do(code, arena, tokens, ctx.layout, grads)
        grad_x = None
        if code.outgoing is not None:
            grad_x = _matrix(arena, code.outgoing, tokens, ctx.program.input.width).clone()
        ctx.arena = None
        arenas.give(arena)
        of_learned = iter(grads)
        needed = ctx.needs_input_grad[3:]
        return None, grad_x, None, *(next(of_learned) if need else None for need in needed)


def programmable(parameters: Sequence[Parameter]) -> bool:
    """Whether a program can have these parameters: each of one operator, contiguous, float32 on the CPU."""
    alone = len(set(map(id, parameters))) == len(parameters)
    return alone and multiplies(*parameters) and all(attends(one) and one.is_contiguous() for one in parameters)
