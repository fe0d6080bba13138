"""Rows of `gae` over threads. Tensors arrive as addresses; launch.py owns shapes and dtypes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint8_t, uint32_t, uintptr_t

from rlhf_kernels.cpu._rows cimport enter_rounding, kernels, leave_rounding, row_kernels, threads_for


def gae(
    uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, bint is_double, int64_t rows,
    int64_t tokens, double gamma, double lam, uintptr_t advantages, uintptr_t returns, int instruction_set, int threads,
) -> None:
    """Fill advantages[rows, tokens] and returns[rows, tokens] from contiguous tensors; bootstrap may have address 0."""
    cdef const uint8_t *inside = <const uint8_t *>mask
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t row
    cdef uint32_t saved = 0
    with nogil, parallel(num_threads=threads_for(rows, rows * tokens, threads)):
        saved = enter_rounding()
        for row in prange(rows, schedule="static"):
            if is_double:
                k.gae_double(
                    <const double *>rewards + row * tokens, <const double *>values + row * tokens,
                    inside + row * tokens, tokens, (<const double *>bootstrap)[row] if bootstrap != 0 else 0.0,
                    gamma, lam, <double *>advantages + row * tokens, <double *>returns + row * tokens)
            else:
                k.gae_float(
                    <const float *>rewards + row * tokens, <const float *>values + row * tokens,
                    inside + row * tokens, tokens, (<const float *>bootstrap)[row] if bootstrap != 0 else 0.0,
                    gamma, lam, <float *>advantages + row * tokens, <float *>returns + row * tokens)
        leave_rounding(saved)
