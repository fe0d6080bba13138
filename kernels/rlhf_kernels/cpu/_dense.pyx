"""Activations, norms, sums and choices of rows over threads. Tensors arrive as addresses; dense.py owns shapes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from rlhf_kernels.cpu._rows cimport enter_rounding, floats, kernels, leave_rounding, row_kernels, threads_for

cdef int64_t CHUNK = 16384
# Rows whose gradients of a norm's weight and bias are added up before those of others; columns summed by one thread.
cdef int64_t ROWS = 32
cdef int64_t COLUMNS = 64


cpdef void activation(
    uintptr_t x, uintptr_t grad, int64_t n, int element_type, int element_bytes, int kind, uintptr_t out,
    int instruction_set, int threads,
) except *:
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


def sums_of_squares(
    const int64_t[::1] addresses, const int64_t[::1] counts, double[::1] sums, int instruction_set, int threads,
) -> None:
    """Fill sums with Σ x² of every array, chunk by chunk, the chunks added in order, so that threads change no bit."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t arrays = counts.shape[0], chunks = 0, elements = 0, a, c, n
    cdef uint32_t saved = 0
    for a in range(arrays):
        chunks += (counts[a] + CHUNK - 1) // CHUNK
        elements += counts[a]
        sums[a] = 0.0
    cdef int workers = threads_for(chunks, elements, threads)
    cdef double *parts = <double *>malloc(<size_t>max(1, chunks) * (sizeof(double) + 2 * sizeof(int64_t)))
    if parts == NULL:
        raise MemoryError(f"no memory for {chunks} partial sums")
    cdef int64_t *array = <int64_t *>(parts + chunks)
    cdef int64_t *first = array + chunks
    with nogil:
        c = 0
        for a in range(arrays):
            for n in range((counts[a] + CHUNK - 1) // CHUNK):
                array[c] = a
                first[c] = n * CHUNK
                c += 1
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for c in prange(chunks, schedule="static"):
                parts[c] = k.sum_of_squares(
                    <const float *>addresses[array[c]] + first[c], min(CHUNK, counts[array[c]] - first[c]))
            leave_rounding(saved)
        for c in range(chunks):
            sums[array[c]] += parts[c]
        free(parts)


cpdef void norm(
    uintptr_t x, int64_t rows, int64_t width, uintptr_t weight, uintptr_t bias, double epsilon, bint centered,
    uintptr_t out, int instruction_set, int threads,
) except *:
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


cpdef void norm_gradients(
    uintptr_t x, uintptr_t grad, int64_t rows, int64_t width, uintptr_t weight, double epsilon, bint centered,
    uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, int instruction_set, int threads,
) except *:
    """Fill grad_x[rows, width] and, where not 0, grad_weight[width] and grad_bias[width], chunks of rows in order."""
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
        if grad_weight:
            k.column_sums(parts, chunks, width, 2 * width, <float *>grad_weight)
        if grad_bias:
            k.column_sums(parts + width, chunks, width, 2 * width, <float *>grad_bias)
        leave_rounding(saved)
        free(parts)


cpdef void column_sums(
    uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t out, int instruction_set, int threads,
) except *:
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


cpdef void combine(
    uintptr_t a, uintptr_t b, int64_t n, bint product, uintptr_t out, int instruction_set, int threads,
) except *:
    """Fill out[n] with a + b, or with a b."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t chunks = (n + CHUNK - 1) // CHUNK, c, at
    cdef int workers = threads_for(chunks, n, threads)
    cdef uint32_t saved = 0
    with nogil, parallel(num_threads=workers):
        saved = enter_rounding()
        for c in prange(chunks, schedule="static"):
            at = c * CHUNK
            k.combine(<const float *>a + at, <const float *>b + at, min(CHUNK, n - at), product, <float *>out + at)
        leave_rounding(saved)


cpdef void rotate(
    uintptr_t x, int64_t rows, int64_t heads, int64_t width, uintptr_t cos, uintptr_t sin, bint back, uintptr_t out,
    int instruction_set, int threads,
) except *:
    """Fill out[rows, heads, width] from x, turned by cos[rows, width] and sin[rows, width], or turned back."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef int64_t r, h, at
    cdef int workers = threads_for(rows, rows * heads * width, threads)
    cdef uint32_t saved = 0
    with nogil, parallel(num_threads=workers):
        saved = enter_rounding()
        for r in prange(rows, schedule="static"):
            for h in range(heads):
                at = (r * heads + h) * width
                k.rotate(
                    <const float *>x + at, width, <const float *>cos + r * width, <const float *>sin + r * width, back,
                    <float *>out + at)
        leave_rounding(saved)


cpdef void select_rows(
    uintptr_t x, uintptr_t places, int64_t count, int64_t width, uintptr_t out, int threads,
) except *:
    """Fill out[count, width] with rows of x; int64 places[count] says which."""
    cdef const int64_t *place = <const int64_t *>places
    cdef int64_t r, row_bytes = width * <int64_t>sizeof(float)
    cdef int workers = threads_for(count, count * width, threads)
    with nogil:
        for r in prange(count, schedule="static", num_threads=workers):
            memcpy(<void *>(out + r * row_bytes), <const void *>(x + place[r] * row_bytes), <size_t>row_bytes)


cpdef void spread_rows(
    uintptr_t x, uintptr_t places, int64_t count, int64_t rows, int64_t width, uintptr_t out,
) except *:
    """Fill out[rows, width] with x[count, width] at int64 places[count], no two of them equal, and zeros elsewhere."""
    cdef const int64_t *place = <const int64_t *>places
    cdef int64_t r, row_bytes = width * <int64_t>sizeof(float)
    with nogil:
        memset(<void *>out, 0, <size_t>(rows * row_bytes))
        for r in range(count):
            memcpy(<void *>(out + place[r] * row_bytes), <const void *>(x + r * row_bytes), <size_t>row_bytes)
