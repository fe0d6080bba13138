"""Blocks of sixteen rows of `gae` over threads. Tensors arrive as addresses; launch.py owns shapes and dtypes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint8_t, uint32_t, uintptr_t

from rlhf_kernels.cpu._rows cimport bring, enter_rounding, kernels, leave_rounding, row_kernels, threads_for, untouched

cdef int64_t BLOCK_ROWS = 16


cdef inline uintptr_t at(uintptr_t address, int64_t bytes) noexcept nogil:
    """So many bytes after the address; 0, which means that there is nothing, stays 0."""
    return address + <uintptr_t>bytes if address != 0 else 0


def gae(
    uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t gammas, uintptr_t lams,
    bint is_double, int64_t rows, int64_t tokens, double gamma, double lam, bint stream, uintptr_t advantages,
    uintptr_t returns, int instruction_set, int threads,
) -> None:
    """Fill advantages[rows, tokens] and returns[rows, tokens] from contiguous tensors.

    The addresses of bootstrap[rows], gammas[rows, tokens] and lams[rows, tokens] may be 0: then 0, gamma and lam count.
    With `stream` the results bypass the cache, where their rows begin at cache lines.
    """
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    cdef int64_t element_bytes = 8 if is_double else 4
    cdef int64_t block, first, n, start
    cdef bint whole_lines = stream and (advantages | returns | <uintptr_t>(tokens * element_bytes)) % 64 == 0
    cdef int64_t all_bytes = rows * tokens * element_bytes
    cdef bint new = untouched(advantages, all_bytes) or untouched(returns, all_bytes)
    cdef uint32_t saved = 0
    with nogil, parallel(num_threads=threads_for(blocks, rows * tokens, threads)):
        saved = enter_rounding()
        for block in prange(blocks, schedule="dynamic"):
            first = block * BLOCK_ROWS
            n = min(BLOCK_ROWS, rows - first)
            start = first * tokens * element_bytes
            if new:
                bring(advantages + start, n * tokens * element_bytes)
                bring(returns + start, n * tokens * element_bytes)
            if is_double:
                k.gae_double(
                    <const double *>at(rewards, start), <const double *>at(values, start),
                    <const uint8_t *>mask + first * tokens, n, tokens,
                    <const double *>at(bootstrap, first * element_bytes), <const double *>at(gammas, start),
                    <const double *>at(lams, start), gamma, lam, whole_lines, <double *>at(advantages, start),
                    <double *>at(returns, start))
            else:
                k.gae_float(
                    <const float *>at(rewards, start), <const float *>at(values, start),
                    <const uint8_t *>mask + first * tokens, n, tokens,
                    <const float *>at(bootstrap, first * element_bytes), <const float *>at(gammas, start),
                    <const float *>at(lams, start), gamma, lam, whole_lines, <float *>at(advantages, start),
                    <float *>at(returns, start))
        leave_rounding(saved)
