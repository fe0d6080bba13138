"""Chunks of `whiten` over threads. Tensors arrive as addresses; launch.py owns shapes and dtypes."""

from cython.parallel cimport parallel, prange
from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc

from rlhf_kernels.cpu._rows cimport bring, enter_rounding, kernels, leave_rounding, row_kernels, threads_for, untouched

# Sums are taken chunk by chunk and the chunks added in order, so the number of threads changes no bit.
cdef int64_t CHUNK = 16384


cdef struct chunk_sums:
    int64_t count
    double sum
    double squares


def whiten(
    uintptr_t x, uintptr_t mask, bint is_double, int64_t n, bint shift_mean, double epsilon, uintptr_t out,
    int instruction_set, int threads,
) -> None:
    """Fill out[n] from contiguous x[n] and mask[n]."""
    cdef const uint8_t *inside = <const uint8_t *>mask
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t element_bytes = 8 if is_double else 4
    cdef bint new = untouched(out, n * element_bytes)
    cdef int64_t chunks = (n + CHUNK - 1) // CHUNK
    cdef int64_t c, start, size, count = 0
    cdef double mean = 0.0, variance = 0.0, scale, shift
    cdef uint32_t saved = 0
    cdef int workers = threads_for(chunks, n, threads)
    cdef chunk_sums *sums = <chunk_sums *>malloc(<size_t>chunks * sizeof(chunk_sums))
    if sums == NULL and chunks > 0:
        raise MemoryError(f"no memory for {chunks} partial sums")
    with nogil:
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for c in prange(chunks, schedule="static"):
                start = c * CHUNK
                size = min(CHUNK, n - start)
                if is_double:
                    k.sum_double(<const double *>x + start, inside + start, size, &sums[c].count, &sums[c].sum)
                else:
                    k.sum_float(<const float *>x + start, inside + start, size, &sums[c].count, &sums[c].sum)
            leave_rounding(saved)
        for c in range(chunks):
            count += sums[c].count
            mean += sums[c].sum
        mean /= max(count, 1)
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for c in prange(chunks, schedule="static"):
                start = c * CHUNK
                size = min(CHUNK, n - start)
                if is_double:
                    sums[c].squares = k.squares_double(<const double *>x + start, inside + start, size, mean)
                else:
                    sums[c].squares = k.squares_float(<const float *>x + start, inside + start, size, mean)
            leave_rounding(saved)
        for c in range(chunks):
            variance += sums[c].squares
        variance /= max(count, 1)
        scale = 1.0 / sqrt(variance + epsilon)  # the square root instruction: correctly rounded everywhere
        shift = 0.0 if shift_mean else mean
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for c in prange(chunks, schedule="static"):
                start = c * CHUNK
                size = min(CHUNK, n - start)
                if new:
                    bring(out + start * element_bytes, size * element_bytes)
                if is_double:
                    k.scale_double(
                        <const double *>x + start, inside + start, size, mean, scale, shift, <double *>out + start)
                else:
                    k.scale_float(
                        <const float *>x + start, inside + start, size, mean, scale, shift, <float *>out + start)
            leave_rounding(saved)
        free(sums)
