"""Activations, transposition and sums of squares over threads. Tensors arrive as addresses; dense.py owns shapes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc

from rlhf_kernels.cpu._rows cimport enter_rounding, kernels, leave_rounding, row_kernels, threads_for

cdef int64_t CHUNK = 16384
# Columns that a thread turns over at a time: their rows' ends lie in few enough pages.
cdef int64_t COLUMNS = 64


def activation(
    uintptr_t x, uintptr_t grad, int64_t n, int element_type, int element_bytes, int kind, uintptr_t out,
    int instruction_set, int threads,
) -> None:
    """Fill out[n] from contiguous x[n], or from x[n] and grad[n] where grad is not 0."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t chunks = (n + CHUNK - 1) // CHUNK
    cdef int64_t c, start
    cdef uint32_t saved = 0
    cdef int workers = threads_for(chunks, n, threads)
    with nogil, parallel(num_threads=workers):
        saved = enter_rounding()
        for c in prange(chunks, schedule="static"):
            start = c * CHUNK * element_bytes
            k.activation(
                <const void *>(x + start), <const void *>(grad + start if grad else 0), min(CHUNK, n - c * CHUNK),
                element_type, kind, <void *>(out + start))
        leave_rounding(saved)


def turn(uintptr_t x, int64_t rows, int64_t columns, uintptr_t out, int instruction_set, int threads) -> None:
    """Fill out[columns, rows] with the transpose of x[rows, columns], both contiguous."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t strips = (columns + COLUMNS - 1) // COLUMNS
    cdef int64_t s
    cdef int workers = threads_for(strips, rows * columns, threads)
    with nogil, parallel(num_threads=workers):
        for s in prange(strips, schedule="static"):
            k.turn(<const float *>x, rows, columns, s * COLUMNS, min(columns, (s + 1) * COLUMNS), <float *>out)


def sum_of_squares(uintptr_t x, int64_t n, int instruction_set, int threads) -> float:
    """Return Σ x² of x[n], chunk by chunk and the chunks added in order, so that threads change no bit."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t chunks = (n + CHUNK - 1) // CHUNK
    cdef int64_t c
    cdef uint32_t saved = 0
    cdef double total = 0.0
    cdef int workers = threads_for(chunks, n, threads)
    cdef double *sums = <double *>malloc(<size_t>chunks * sizeof(double))
    if sums == NULL and chunks > 0:
        raise MemoryError(f"no memory for {chunks} partial sums")
    with nogil:
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for c in prange(chunks, schedule="static"):
                sums[c] = k.sum_of_squares(<const float *>x + c * CHUNK, min(CHUNK, n - c * CHUNK))
            leave_rounding(saved)
        for c in range(chunks):
            total += sums[c]
        free(sums)
    return total
