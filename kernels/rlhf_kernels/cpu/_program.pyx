"""Carries out the instructions of a program one after the other. Tensors arrive as addresses; _operations.py writes.

An instruction is a row of int64: its kind, a float64, whether its matrices have a row for each token or for each that
is read, ten numbers, and the places of eight matrices. A place is a base, a number of columns of as many floats as
there are tokens, and a number of floats: so far behind the base's address.
"""

from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcpy

from rlhf_kernels.cpu._attention cimport attend_cached, attend_rows, attend_rows_backward
from rlhf_kernels.cpu._dense cimport (
    activation, column_sums, combine, norm, norm_gradients, rotate, select_rows, spread_rows,
)
from rlhf_kernels.cpu._product cimport multiply

cdef enum:
    REAL = 1
    READ = 2
    NUMBERS = 3
    PLACES = 13
    LENGTH = 37

INSTRUCTION = LENGTH
FIRST_PLACE = PLACES


cpdef enum Base:
    ABSOLUTE
    ARENA
    OTHERS


cpdef enum Kind:
    NORM
    NORM_GRADIENTS
    ACTIVATION
    MULTIPLY
    COLUMN_SUMS
    ADD
    TIMES
    ROTATE
    ATTEND
    ATTEND_GRADIENTS
    ATTEND_CACHED
    SELECT
    SPREAD


def run(
    const int64_t[:, ::1] code, const int64_t[::1] bases, int64_t tokens, int64_t rows, uintptr_t starts,
    const int64_t[::1] read, int64_t room, int threads, int instruction_set,
) -> None:
    """Carry out every instruction on ``tokens`` tokens of ``rows`` rows.

    ``starts`` are those of attend_rows or, over caches of that ``room``, the lengths of attend_cached. ``read`` are the
    tokens that SELECT leaves, no two of them equal.
    """
    cdef const int64_t *i
    cdef const int64_t *n
    cdef uintptr_t p[8]
    cdef int64_t at, place, all_rows
    cdef uintptr_t reading = <uintptr_t>&read[0] if read.shape[0] else 0
    cdef double real
    for at in range(read.shape[0]):
        if not 0 <= read[at] < tokens:
            raise IndexError(f"token {read[at]} is read; there are {tokens}")
    if code.shape[0] and code.shape[1] != LENGTH:
        raise ValueError(f"an instruction has {code.shape[1]} numbers; it must have {LENGTH}")
    for at in range(code.shape[0]):
        i = &code[at, 0]
        n = i + NUMBERS
        memcpy(&real, i + REAL, sizeof(double))
        all_rows = read.shape[0] if i[READ] else tokens
        for place in range(8):
            p[place] = <uintptr_t>(bases[i[PLACES + 3 * place]] + <int64_t>sizeof(float) * (
                tokens * i[PLACES + 3 * place + 1] + i[PLACES + 3 * place + 2]))
        if i[0] == NORM:
            norm(p[0], all_rows, n[0], p[1], p[2], real, n[1], p[3], instruction_set, threads)
        elif i[0] == NORM_GRADIENTS:
            norm_gradients(p[0], p[1], all_rows, n[0], p[2], real, n[1], p[3], p[4], p[5], instruction_set, threads)
        elif i[0] == ACTIVATION:
            activation(p[0], p[1], all_rows * n[0], 0, sizeof(float), <int>n[1], p[2], instruction_set, threads)
        elif i[0] == MULTIPLY:
            multiply(
                p[0], n[3], n[4], p[1], n[5], n[6], all_rows if n[0] < 0 else n[0], all_rows if n[1] < 0 else n[1],
                n[2], False, p[2], p[3], n[2], p[4], n[2], instruction_set, threads)
        elif i[0] == COLUMN_SUMS:
            column_sums(p[0], all_rows, n[0], n[0], p[1], instruction_set, threads)
        elif i[0] == ADD:
            combine(p[0], p[1], all_rows * n[0], False, p[2], instruction_set, threads)
        elif i[0] == TIMES:
            combine(p[0], p[1], all_rows * n[0], True, p[2], instruction_set, threads)
        elif i[0] == ROTATE:
            rotate(p[0], all_rows, n[0], n[1], p[1], p[2], n[2], p[3], instruction_set, threads)
        elif i[0] == ATTEND:
            attend_rows(
                p[0], p[1], p[2], starts, rows, n[0], n[1], n[2], n[3], n[4], n[5], real, p[3], p[4], instruction_set,
                threads)
        elif i[0] == ATTEND_GRADIENTS:
            attend_rows_backward(
                p[0], p[1], p[2], p[3], p[4], starts, rows, n[0], n[1], n[2], n[3], n[4], n[5], real, p[5], p[6], p[7],
                n[6], n[7], n[8], instruction_set, threads)
        elif i[0] == ATTEND_CACHED:
            attend_cached(
                p[0], p[1], p[2], p[3], p[4], starts, rows, room, n[0], n[1], n[2], n[3], n[4], n[5], real, p[5],
                instruction_set, threads)
        elif i[0] == SELECT:
            select_rows(p[0], reading, read.shape[0], n[0], p[1], threads)
        elif i[0] == SPREAD:
            spread_rows(p[0], reading, read.shape[0], tokens, n[0], p[1])
        else:
            raise ValueError(f"instruction {at} has the unknown kind {i[0]}")
