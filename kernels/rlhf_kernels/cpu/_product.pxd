"""What other extension modules call of _product."""

from libc.stdint cimport int64_t, uintptr_t

cpdef void multiply(
    uintptr_t a, int64_t a_row, int64_t a_k, uintptr_t b, int64_t b_k, int64_t b_n, int64_t rows, int64_t depth,
    int64_t columns, bint add, uintptr_t bias, uintptr_t residual, int64_t residual_row, uintptr_t out, int64_t out_row,
    int instruction_set, int threads,
) except *
