"""Rows of `token_logprobs` over threads. Tensors arrive as addresses; launch.py owns shapes and dtypes."""

from cython.parallel cimport parallel, prange
from libc.stdint cimport int64_t, uint32_t, uintptr_t

from rlhf_kernels.cpu._rows cimport SHORT, SHORT_ROWS, enter_rounding, kernels, leave_rounding, row_kernels, threads_for


cdef inline int64_t row_start(int64_t row, int64_t inner, int64_t outer_stride, int64_t inner_stride) noexcept nogil:
    """Where a row starts, in elements. A division takes as long as a vector of logits: mostly there is none."""
    return row * outer_stride if inner == 1 else row // inner * outer_stride + row % inner * inner_stride


cdef int64_t first_bad_label(
    const int64_t *labels, int64_t rows, int64_t vocabulary, bint ignoring, int64_t ignore_index) noexcept nogil:
    cdef int64_t row
    for row in range(rows):
        if not 0 <= labels[row] < vocabulary and not (ignoring and labels[row] == ignore_index):
            return row
    return -1


cdef void forward_rows(
    const row_kernels *k, const char *base, int element_type, int element_bytes, int64_t first, int64_t end,
    int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t vocabulary, const int64_t *labels, bint ignoring,
    int64_t ignore_index, double inverse_temperature, float *logp, float *entropy, float *statistics) noexcept nogil:
    """At most SHORT_ROWS rows, together where they are short."""
    cdef const void *logits[SHORT_ROWS]
    cdef int64_t kept[SHORT_ROWS]
    cdef int64_t kept_labels[SHORT_ROWS]
    cdef float kept_logp[SHORT_ROWS]
    cdef float kept_entropy[SHORT_ROWS]
    cdef float kept_statistics[2 * SHORT_ROWS]
    cdef int64_t row, i, count = 0
    logits[0] = NULL
    kept_labels[0] = 0  # where all are ignored
    for row in range(first, end):
        if ignoring and labels[row] == ignore_index:
            logp[row] = 0.0
            statistics[2 * row] = 0.0
            statistics[2 * row + 1] = 0.0
            if entropy != NULL:
                entropy[row] = 0.0
            continue
        kept[count] = row
        kept_labels[count] = labels[row]
        logits[count] = base + row_start(row, inner, outer_stride, inner_stride) * element_bytes
        count += 1
    if vocabulary > SHORT:
        for i in range(count):
            k.logprob_forward(
                logits[i], vocabulary, element_type, kept_labels[i], inverse_temperature, logp + kept[i],
                entropy + kept[i] if entropy != NULL else NULL, statistics + 2 * kept[i])
        return
    k.logprob_forward_short(
        logits, count, vocabulary, element_type, kept_labels, inverse_temperature, kept_logp,
        kept_entropy if entropy != NULL else NULL, kept_statistics)
    for i in range(count):
        row = kept[i]
        logp[row] = kept_logp[i]
        statistics[2 * row] = kept_statistics[2 * i]
        statistics[2 * row + 1] = kept_statistics[2 * i + 1]
        if entropy != NULL:
            entropy[row] = kept_entropy[i]


def forward(
    uintptr_t logits, int element_type, int element_bytes, int64_t rows, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t vocabulary, uintptr_t labels, bint ignoring, int64_t ignore_index,
    double temperature, uintptr_t logp, uintptr_t entropy, uintptr_t statistics, int instruction_set, int threads,
) -> int:
    """Fill logp[rows], entropy[rows] (where its address is not 0) and statistics[rows, 2].

    Row r starts at logits + (r // inner) * outer_stride + (r % inner) * inner_stride elements.
    Returns the first row whose label is out of range, with nothing written, or -1.
    """
    cdef const int64_t *label = <const int64_t *>labels
    cdef const char *base = <const char *>logits
    cdef float *out_logp = <float *>logp
    cdef float *out_entropy = <float *>entropy
    cdef float *out_statistics = <float *>statistics
    cdef const row_kernels *k = kernels(instruction_set)
    cdef double inverse_temperature = 1.0 / temperature
    cdef int64_t bad
    cdef uint32_t saved = 0
    with nogil:
        bad = first_bad_label(label, rows, vocabulary, ignoring, ignore_index)
    if bad >= 0:
        return bad
    cdef int64_t group = SHORT_ROWS if vocabulary <= SHORT else 1
    cdef int64_t groups = (rows + group - 1) // group
    cdef int64_t g
    with nogil, parallel(num_threads=threads_for(groups, rows * vocabulary, threads)):
        saved = enter_rounding()
        for g in prange(groups, schedule="static"):
            forward_rows(
                k, base, element_type, element_bytes, g * group, min((g + 1) * group, rows), inner, outer_stride,
                inner_stride, vocabulary, label, ignoring, ignore_index, inverse_temperature, out_logp, out_entropy,
                out_statistics)
        leave_rounding(saved)
    return -1


def first_label_out_of_range(
    uintptr_t labels, int64_t rows, int64_t vocabulary, bint ignoring, int64_t ignore_index
) -> int:
    """The first row whose label is out of range, or -1."""
    return first_bad_label(<const int64_t *>labels, rows, vocabulary, ignoring, ignore_index)


def read_part(
    uintptr_t logits, int element_type, int element_bytes, int64_t rows, int64_t columns, int64_t first_column,
    uintptr_t labels, double temperature, bint with_entropy, uintptr_t states, int instruction_set, int threads,
) -> None:
    """Add logits[rows, columns], which stand at first_column of the vocabulary, to states[rows, 4]."""
    cdef const int64_t *label = <const int64_t *>labels
    cdef const char *base = <const char *>logits
    cdef double *state = <double *>states
    cdef const row_kernels *k = kernels(instruction_set)
    cdef double inverse_temperature = 1.0 / temperature
    cdef int64_t row
    cdef uint32_t saved = 0
    with nogil, parallel(num_threads=threads_for(rows, rows * columns, threads)):
        saved = enter_rounding()
        for row in prange(rows, schedule="static"):
            k.logprob_read(base + row * columns * element_bytes, columns, element_type, label[row] - first_column,
                           inverse_temperature, with_entropy, state + 4 * row)
        leave_rounding(saved)


def finish(
    uintptr_t states, int64_t rows, double temperature, uintptr_t logp, uintptr_t entropy, uintptr_t statistics,
    int instruction_set,
) -> None:
    """Fill logp[rows], entropy[rows] (where its address is not 0) and statistics[rows, 2] from states[rows, 4]."""
    cdef const double *state = <const double *>states
    cdef const row_kernels *k = kernels(instruction_set)
    cdef double inverse_temperature = 1.0 / temperature
    cdef int64_t row
    cdef uint32_t saved = enter_rounding()
    for row in range(rows):
        k.logprob_finish(state + 4 * row, inverse_temperature, <float *>logp + row,
                         <float *>entropy + row if entropy != 0 else NULL, <float *>statistics + 2 * row)
    leave_rounding(saved)


def backward(
    uintptr_t logits, int element_type, int element_bytes, int64_t rows, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t vocabulary, int64_t first_column, uintptr_t labels, bint ignoring, int64_t ignore_index,
    double temperature, uintptr_t statistics, uintptr_t entropy, uintptr_t grad_logp, uintptr_t grad_entropy,
    uintptr_t grad_logits, bint stream, int instruction_set, int threads,
) -> None:
    """Fill grad_logits[rows, vocabulary]; grad_logp or grad_entropy may have the address 0, which means 0.

    The logits may be a part of a row, at first_column of its vocabulary, and grad_logits may be the logits.
    """
    cdef const int64_t *label = <const int64_t *>labels
    cdef const char *base = <const char *>logits
    cdef const float *row_entropy = <const float *>entropy
    cdef const float *row_statistics = <const float *>statistics
    cdef const float *row_grad_logp = <const float *>grad_logp
    cdef const float *row_grad_entropy = <const float *>grad_entropy
    cdef char *out = <char *>grad_logits
    cdef const row_kernels *k = kernels(instruction_set)
    cdef double inverse_temperature = 1.0 / temperature
    cdef int64_t row
    cdef bint ignored
    cdef uint32_t saved = 0
    with nogil, parallel(num_threads=threads_for(rows, rows * vocabulary, threads)):
        saved = enter_rounding()
        for row in prange(rows, schedule="static"):
            ignored = ignoring and label[row] == ignore_index
            k.logprob_backward(
                base + row_start(row, inner, outer_stride, inner_stride) * element_bytes,
                vocabulary, element_type, label[row] - first_column, inverse_temperature, row_statistics + 2 * row,
                row_entropy[row] if row_grad_entropy != NULL else 0.0,
                row_grad_logp[row] if row_grad_logp != NULL and not ignored else 0.0,
                row_grad_entropy[row] if row_grad_entropy != NULL and not ignored else 0.0,
                stream, out + row * vocabulary * element_bytes)
        leave_rounding(saved)
