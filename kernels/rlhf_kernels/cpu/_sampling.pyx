"""Rows of `sample_tokens` over threads. Tensors arrive as addresses; launch.py owns shapes and dtypes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc

from rlhf_kernels.cpu._rows cimport enter_rounding, kernels, leave_rounding, row_kernels, threads_for


def sample(
    uintptr_t logits, int element_type, int element_bytes, int64_t rows, int64_t row_stride, int64_t vocabulary,
    uintptr_t uniforms, double temperature, int64_t top_k, double top_p, uintptr_t ids, uintptr_t logprobs,
    uintptr_t filtered_logprobs, int instruction_set, int threads,
) -> int:
    """Fill ids[rows], logprobs[rows] and filtered_logprobs[rows] from uniforms[rows], which are float64.

    Returns the first row that is no distribution, or -1.

    Raises:
        MemoryError: no memory for the filter of top-k and top-p.
    """
    cdef const char *base = <const char *>logits
    cdef const double *uniform = <const double *>uniforms
    cdef int64_t *out_ids = <int64_t *>ids
    cdef float *out_logprobs = <float *>logprobs
    cdef float *out_filtered = <float *>filtered_logprobs
    cdef const row_kernels *k = kernels(instruction_set)
    cdef double inverse_temperature = 1.0 / temperature
    cdef int64_t row
    cdef uint32_t saved = 0
    cdef int *status = <int *>malloc(<size_t>rows * sizeof(int))
    if status == NULL:
        raise MemoryError(f"no memory for {rows} rows")
    try:
        with nogil, parallel(num_threads=threads_for(rows, rows * vocabulary, threads)):
            saved = enter_rounding()
            for row in prange(rows, schedule="static"):
                status[row] = k.sample(
                    base + row * row_stride * element_bytes, vocabulary, element_type, uniform[row], inverse_temperature,
                    top_k, top_p, out_ids + row, out_logprobs + row, out_filtered + row)
            leave_rounding(saved)
        for row in range(rows):
            if status[row] == -2:
                raise MemoryError(f"no memory to filter {vocabulary} tokens")
            if status[row] == -1:
                return row
        return -1
    finally:
        free(status)
