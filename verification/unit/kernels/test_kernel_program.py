"""Programs: each operator and its gradients against float64, and the same bits however a program is carried out."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

import rlhf_kernels

if "cython" not in rlhf_kernels.available_backends():
    pytest.skip("the Cython kernels are not built", allow_module_level=True)

from rlhf_kernels import arenas
from rlhf_kernels import program as module
from rlhf_kernels.attention import Cache
from rlhf_kernels.cpu import _program, launch
from rlhf_kernels.dense import GELU, SILU, Norm
from rlhf_kernels.products import available
from rlhf_kernels.program import Program, heads_in, programmable

if not available():
    pytest.skip("no native products on this processor", allow_module_level=True)

LENGTHS = [5, 1, 20]
STARTS = torch.tensor([0, 5, 6, 26])
TOKENS = 26
READ = torch.tensor([1, 4, 5, 6, 20, 25])
NONE = torch.zeros(0, dtype=torch.int64).numpy()
HEADS, SHARED, WIDTH = 4, 2, 6
TURNS = tuple(torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9)) for _ in range(2))


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator) / 3) for shape in shapes]


def attention(matrices):
    """Torch's, row by row."""
    parts, rows = heads_in(matrices, HEADS, SHARED, WIDTH), []
    for first, last in zip(STARTS[:-1].tolist(), STARTS[1:].tolist(), strict=True):
        row = (x[first:last].transpose(0, 1)[None] for x in parts)
        rows.append(scaled_dot_product_attention(*row, is_causal=True, scale=0.3, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(rows).flatten(1)


def turned(x, turns):
    cosine, sine = (turn[:, None] for turn in turns)
    heads = x.view(len(x), -1, WIDTH)
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosine + torch.cat([-second, first], dim=-1) * sine).view(x.shape)


def say_norm(program, weight, bias):
    program.rowwise(Norm(1e-5, centered=True), program.input, weight, bias)


def say_projections(program, narrow, bias, weight, shift, wide, back, last):
    """A joint projection behind a norm, a transposed one behind GELU, a residual: and x is read twice."""
    x = program.linear(program.input, narrow, bias, before=Norm(1e-5, centered=True), parameters=(weight, shift))
    y = program.linear(x, wide, None, transposed=True)
    program.linear(y, back, last, before=GELU, residual=x)


def say_gate(program, gate, wide):
    program.gated(SILU, program.linear(program.input, gate, None), program.linear(program.input, wide, None))


def say_joint_attention(program, joint):
    program.attended((program.linear(program.input, joint, None),), HEADS, SHARED, WIDTH, 0.3)


def say_turned_attention(program, query, key, value):
    query, key, value = (program.linear(program.input, one, None) for one in (query, key, value))
    query, key = (program.rotated(x, WIDTH) for x in (query, key))
    program.attended((query, key, value), HEADS, SHARED, WIDTH, 0.3)


def say_selection(program, joint, mix, wide):
    """What a model's last block does: attention over all tokens, the rest for those that are read."""
    attended = program.attended((program.linear(program.input, joint, None),), HEADS, SHARED, WIDTH, 0.3)
    x = program.linear(program.selected(attended), mix, None, residual=program.selected(program.input))
    program.linear(program.rowwise(GELU, x), wide, None)


def selection(x, turns, joint, mix, wide):
    y = attention([x @ joint.t()])[READ] @ mix.t() + x[READ]
    return gelu(y, approximate="tanh") @ wide.t()


def projections(x, turns, narrow, bias, weight, shift, wide, back, last):
    y = layer_norm(x, (10,), weight, shift) @ narrow.t() + bias
    return y + gelu(y @ wide, approximate="tanh") @ back.t() + last


PROGRAMS = {  # how it is said, the shapes of its parameters, and what it is in torch
    "norm": (say_norm, [(10,), (10,)], lambda x, turns, w, b: layer_norm(x, (10,), w, b)),
    "projections": (say_projections, [(7, 10), (7,), (10,), (10,), (7, 18), (7, 18), (7,)], projections),
    "gate": (say_gate, [(13, 10), (13, 10)], lambda x, turns, gate, wide: silu(x @ gate.t()) * (x @ wide.t())),
    "joint attention": (say_joint_attention, [(48, 10)], lambda x, turns, joint: attention([x @ joint.t()])),
    "turned attention": (
        say_turned_attention,
        [(24, 10), (12, 10), (12, 10)],
        lambda x, turns, query, key, value: attention(
            [turned(x @ query.t(), turns), turned(x @ key.t(), turns), x @ value.t()]
        ),
    ),
    "selection": (say_selection, [(48, 10), (10, 24), (7, 10)], selection),
}


def new_program(name, seed=0):
    say, shapes, _ = PROGRAMS[name]
    program, parameters = Program(10), weights(*shapes, seed=seed)
    say(program, *parameters)
    return program, parameters


def rows_in(seed=1):
    return torch.randn(TOKENS, 10, generator=torch.Generator().manual_seed(seed))


def with_gradients(program, parameters, seed=1, upstream=None):
    """The result, and the gradients of input and parameters."""
    x = rows_in(seed).requires_grad_()
    y = program.run(x, STARTS, TURNS, READ)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)) if upstream is None else upstream
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_and_gradients_are_those_of_float64(name):
    program, parameters = new_program(name)
    ours = with_gradients(program, parameters)
    x = rows_in().double().requires_grad_()
    exact = [parameter.detach().double().requires_grad_() for parameter in parameters]
    y = PROGRAMS[name][2](x, [turn.double() for turn in TURNS], *exact)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
    theirs = [y.detach(), *torch.autograd.grad(y, [x, *exact], upstream)]
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=2e-5)


def test_parameters_that_a_program_cannot_have_are_told():
    assert programmable(weights((3, 4)))
    assert not programmable([Parameter(torch.randn(3, 4).double())])
    assert not programmable([Parameter(torch.randn(4, 3).t())])
    assert not programmable(2 * weights((3, 4)))  # its gradient would be that of one operator


@pytest.mark.parametrize("name", ["projections", "gate", "joint attention", "turned attention", "selection"])
def test_without_gradients_the_bits_are_the_same_in_less_memory(name):
    program, parameters = new_program(name)
    kept = program.run(rows_in().requires_grad_(), STARTS, TURNS, READ)
    with torch.no_grad():
        passing = program.run(rows_in(), STARTS, TURNS, READ)
    assert torch.equal(kept, passing)
    forward, _ = program._keeping(tuple(parameters), True)
    assert program._passing().columns < forward.columns


@pytest.mark.parametrize("name", ["projections", "gate", "joint attention", "turned attention", "selection"])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(name):
    program, parameters = new_program(name)
    found, threads = [], torch.get_num_threads()
    try:
        for instruction_set in launch.usable_instruction_sets()[1:]:
            for count in (1, 3):
                launch.use_instruction_set(instruction_set)
                torch.set_num_threads(count)
                found.append(with_gradients(program, parameters))
    finally:
        launch.use_instruction_set(None)
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])


def test_passes_in_flight_keep_to_their_own_memory():
    program, parameters = new_program("turned attention")
    alone = [with_gradients(program, parameters, seed) for seed in (1, 2)]
    inputs = [rows_in(seed).requires_grad_() for seed in (1, 2)]
    outputs = [program.run(x, STARTS, TURNS) for x in inputs]
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    for x, y, right in zip(inputs, outputs, alone, strict=True):
        assert same([y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)], right)


@pytest.mark.parametrize("at", ["the forward pass", "the backward pass"])
def test_another_thread_may_write_a_program_down_at_the_same_time(monkeypatch, at):
    program, parameters = new_program("turned attention")
    right, finished, calls, others = with_gradients(*new_program("turned attention")), module._finished, [], []

    def interrupted(*code):
        calls.append(code)
        if at == ("the forward pass", "the backward pass")[len(calls) - 1]:
            monkeypatch.setattr(module, "_finished", finished)
            with ThreadPoolExecutor(1) as other:
                others.append(other.submit(with_gradients, program, parameters).result())
        return finished(*code)

    monkeypatch.setattr(module, "_finished", interrupted)
    assert same(with_gradients(program, parameters), right)
    assert same(others[0], right)


def test_memory_of_a_pass_that_is_over_serves_the_next():
    program, parameters = new_program("gate")
    with_gradients(program, parameters)
    addresses = [arena.data_ptr() for arena in arenas._free]
    with_gradients(program, parameters)
    assert [arena.data_ptr() for arena in arenas._free] == addresses


def test_a_pass_without_a_gradient_works_in_the_memory_of_one_that_is_over():
    program, parameters = new_program("joint attention")
    right = with_gradients(program, parameters)[0]
    addresses = [arena.data_ptr() for arena in arenas._free]
    with torch.no_grad():
        assert torch.equal(program.run(rows_in(), STARTS, TURNS), right)
        found, caches = program.run_into_caches(rows_in(), STARTS, TURNS, 3, torch.arange(TOKENS))
        assert torch.equal(found, right)
        keys = [cache.keys.clone() for cache in caches]
        program.run(rows_in(seed=5), STARTS, TURNS)
        with pytest.raises(IndexError):
            program.run(rows_in(), STARTS, TURNS, torch.tensor([TOKENS]))
    assert [arena.data_ptr() for arena in arenas._free] == addresses
    assert all(torch.equal(cache.keys, before) for cache, before in zip(caches, keys, strict=True))


def test_an_arena_that_is_too_small_is_let_go(monkeypatch):
    monkeypatch.setattr(arenas, "_free", [])
    with arenas.lent(10):
        pass
    small = arenas._free[0].data_ptr()
    with arenas.lent(8) as arena:
        assert arena.data_ptr() == small
        with arenas.lent(20) as other:
            assert other.numel() == 20
    assert [arena.numel() for arena in arenas._free] == [20, 10]
    with arenas.lent(30):
        assert [arena.numel() for arena in arenas._free] == [20]
    assert [arena.numel() for arena in arenas._free] == [20, 30]


def test_of_the_arenas_that_nobody_works_in_the_largest_are_kept(monkeypatch):
    monkeypatch.setattr(arenas, "_free", [])
    for size in (20, 40, 10, 30):
        arenas.give(arenas.new(size))
    arenas.keep(2)
    assert sorted(arena.numel() for arena in arenas._free) == [30, 40]
    arenas.keep(3)
    assert len(arenas._free) == 2
    arenas.keep(0)
    assert arenas._free == []


def test_torchs_default_dtype_is_not_that_of_the_arena(monkeypatch):
    program, parameters = new_program("turned attention")
    right = with_gradients(program, parameters)
    inputs = rows_in().requires_grad_()
    upstream = torch.randn(right[0].shape, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(arenas, "_free", [])
    torch.set_default_dtype(torch.float64)
    try:
        y = program.run(inputs, STARTS, TURNS)
        found = [y.detach(), *torch.autograd.grad(y, [inputs, *parameters], upstream)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, right)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, where a tangent is made
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_tangent_is_refused_and_stays_in_no_arena(with_grad):
    program = Program(8)
    program.linear(program.input, *weights((8, 8), (8,)))
    x = torch.randn(TOKENS, 8)
    step = program.over([Cache(*[torch.ones(2, 1, 4)] * 2, torch.tensor([0, 1, 2]), 1)], 2)
    with torch.set_grad_enabled(with_grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (
            lambda: program.run(dual, STARTS),
            lambda: program.run_into_caches(dual, STARTS, None, 1, READ),
            lambda: step(dual[:2], torch.tensor([1, 1])),
        ):
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                call()
        assert forward_ad.unpack_dual(program.run(x, STARTS)).tangent is None


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1, 2]])
def test_frozen_parameters_get_no_gradient_and_others_the_same_bits(frozen):
    program, parameters = new_program("turned attention")
    right = with_gradients(program, parameters)
    for at in frozen:
        parameters[at].requires_grad_(False)
    learned = [at for at in range(3) if at not in frozen]
    found = with_gradients(program, [parameters[at] for at in learned])
    assert same(found, [right[0], right[1], *(right[2 + at] for at in learned)])


def test_parameters_alone_can_have_gradients():
    program, parameters = new_program("gate")
    right = with_gradients(program, parameters)
    y = program.run(rows_in(), STARTS)
    assert same(
        torch.autograd.grad(y, parameters, torch.randn(y.shape, generator=torch.Generator().manual_seed(2))), right[2:]
    )


def test_a_second_backward_pass_is_refused():
    program, parameters = new_program("gate")
    y = program.run(rows_in(), STARTS)
    torch.autograd.grad(y.sum(), parameters, retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after the first; run forward again"):
        torch.autograd.grad(y.sum(), parameters)


def test_parameters_that_changed_before_the_backward_pass_are_found_out():
    program, parameters = new_program("gate")
    y = program.run(rows_in(), STARTS)
    with torch.no_grad():
        parameters[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), parameters)


def test_every_token_is_read_unless_some_are_named():
    program, _ = new_program("selection")
    with torch.no_grad():
        whole = program.run(rows_in(), STARTS, TURNS)
        assert whole.shape == (TOKENS, 7)
        assert torch.equal(program.run(rows_in(), STARTS, TURNS, READ), whole[READ])
        assert program.run(rows_in(), STARTS, TURNS, READ[:0]).shape == (0, 7)


def test_what_nobody_reads_adds_nothing_to_a_gradient():
    program, parameters = new_program("selection")
    x = rows_in().requires_grad_()
    upstream = torch.randn(TOKENS, 7, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros_like(upstream)
    zeros[READ] = upstream[READ]
    whole = torch.autograd.grad(program.run(x, STARTS, TURNS), [x, *parameters], zeros)
    read = torch.autograd.grad(program.run(x, STARTS, TURNS, READ), [x, *parameters], upstream[READ])
    assert same(whole, read)


def test_what_needs_all_tokens_is_said_before_some_are_selected():
    program, weight = Program(24), weights((24, 24))[0]
    read = program.selected(program.input)
    for say in (
        lambda: program.selected(read),
        lambda: program.rotated(read, WIDTH),
        lambda: program.attended((read, read, read), HEADS, HEADS, WIDTH, 0.3),
    ):
        with pytest.raises(ValueError, match="needs all tokens of a row; say it before"):
            say()
    for say in (
        lambda: program.gated(SILU, read, program.input),
        lambda: program.linear(read, weight, None, residual=program.input),
    ):
        with pytest.raises(ValueError, match="all tokens and the other those that are selected"):
            say()


@pytest.mark.parametrize("token", [-1, TOKENS])
def test_a_token_that_is_not_there_cannot_be_read(token):
    program, _ = new_program("selection")
    with torch.no_grad(), pytest.raises(IndexError, match=f"token {token} is read; there are {TOKENS}"):
        program.run(rows_in(), STARTS, TURNS, torch.tensor([0, token]))


@pytest.mark.parametrize("name", ["joint attention", "turned attention", "selection"])
def test_a_token_over_caches_has_the_bits_of_the_token_in_its_row(name):
    program, _ = new_program(name)
    x, lengths = rows_in(), torch.tensor(LENGTHS)
    with torch.no_grad():
        whole = program.run(x, STARTS, TURNS)
        first = torch.cat([torch.arange(0, 3), torch.arange(6, 24)])  # the second row has no token to go on with
        starts, rows = torch.tensor([0, 3, 21]), [0, 2]
        begun, caches = program.run_into_caches(x[first], starts, [turn[first] for turn in TURNS], 2, torch.arange(21))
        assert torch.equal(begun, whole[first])
        step, seen = program.over(caches, len(rows)), torch.tensor([3, 18])
        for _ in range(2):
            at = STARTS[:-1][rows] + seen
            assert torch.equal(step(x[at], seen, [turn[at] for turn in TURNS]), whole[at])
            seen += 1
    assert seen.tolist() == lengths[rows].tolist()


def test_instructions_that_are_none_are_named():
    bases = torch.zeros(5, dtype=torch.int64).numpy()
    line = torch.zeros(1, _program.INSTRUCTION, dtype=torch.int64)
    line[0, 0] = 99
    with pytest.raises(ValueError, match="instruction 0 has the unknown kind 99"):
        _program.run(line.numpy(), bases, 1, 1, 0, NONE, 0, 1, 0)
    with pytest.raises(ValueError, match="has 3 numbers; it must have 37"):
        _program.run(line[:, :3].contiguous().numpy(), bases, 1, 1, 0, NONE, 0, 1, 0)
