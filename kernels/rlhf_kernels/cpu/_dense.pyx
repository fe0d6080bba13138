"""Activations, norms and sums over threads. Tensors arrive as addresses; dense.py owns shapes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from rlhf_kernels.cpu._rows cimport enter_rounding, floats, kernels, leave_rounding, row_kernels, threads_for

cdef int64_t CHUNK = 16384
# Rows whose gradients of a norm's weight and bias are added up before those of others; columns summed by one thread.
cdef int64_t ROWS = 32
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


def norm(
    uintptr_t x, int64_t rows, int64_t width, uintptr_t weight, uintptr_t bias, double epsilon, bint centered,
    uintptr_t out, int instruction_set, int threads,
) -> None:
    """Fill out[rows, width] from x[rows, width]; bias may be 0."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t chunks = (rows + ROWS - 1) // ROWS
    cdef int64_t c
    cdef uint32_t saved = 0
    cdef int workers = threads_for(chunks, rows * width, threads)
    with nogil, parallel(num_threads=workers):
        saved = enter_rounding()
        for c in prange(chunks, schedule="static"):
            k.norm(
                <const float *>x + c * ROWS * width, min(ROWS, rows - c * ROWS), width, <const float *>weight,
                <const float *>bias, epsilon, centered, <float *>out + c * ROWS * width)
        leave_rounding(saved)


def norm_gradients(
    uintptr_t x, uintptr_t grad, int64_t rows, int64_t width, uintptr_t weight, double epsilon, bint centered,
    uintptr_t grad_x, uintptr_t sums, int instruction_set, int threads,
) -> None:
    """Fill grad_x[rows, width] and sums[2, width], the gradients of weight and bias, chunks of rows added in order."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t chunks = (rows + ROWS - 1) // ROWS
    cdef int64_t c
    cdef uint32_t saved = 0
    cdef int workers = threads_for(chunks, rows * width, threads)
    cdef float *parts = floats(chunks * 2 * width)
    with nogil:
        memset(parts, 0, <size_t>(chunks * 2 * width) * sizeof(float))
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for c in prange(chunks, schedule="static"):
                k.norm_gradients(
                    <const float *>x + c * ROWS * width, <const float *>grad + c * ROWS * width,
                    min(ROWS, rows - c * ROWS), width, <const float *>weight, epsilon, centered,
                    <float *>grad_x + c * ROWS * width, parts + c * 2 * width)
            leave_rounding(saved)
        saved = enter_rounding()
        k.column_sums(parts, chunks, 2 * width, 2 * width, <float *>sums)
        leave_rounding(saved)
        free(parts)


def column_sums(
    uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t out, int instruction_set, int threads,
) -> None:
    """Fill out[columns] with the sums of x[rows, columns], whose rows lie ``stride`` floats apart."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t strips = (columns + COLUMNS - 1) // COLUMNS
    cdef int64_t s
    cdef uint32_t saved = 0
    cdef int workers = threads_for(strips, rows * columns, threads)
    with nogil, parallel(num_threads=workers):
        saved = enter_rounding()
        for s in prange(strips, schedule="static"):
            k.column_sums(
                <const float *>x + s * COLUMNS, rows, min(COLUMNS, columns - s * COLUMNS), stride,
                <float *>out + s * COLUMNS)
        leave_rounding(saved)
