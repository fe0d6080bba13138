"""What other extension modules call of _dense."""

from libc.stdint cimport int64_t, uintptr_t

cpdef void activation(
    uintptr_t x, uintptr_t grad, int64_t n, int element_type, int element_bytes, int kind, uintptr_t out,
    int instruction_set, int threads,
) except *
cpdef void norm(
    uintptr_t x, int64_t rows, int64_t width, uintptr_t weight, uintptr_t bias, double epsilon, bint centered,
    uintptr_t out, int instruction_set, int threads,
) except *
cpdef void norm_gradients(
    uintptr_t x, uintptr_t grad, int64_t rows, int64_t width, uintptr_t weight, double epsilon, bint centered,
    uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, int instruction_set, int threads,
) except *
cpdef void column_sums(
    uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t out, int instruction_set, int threads,
) except *
cpdef void combine(
    uintptr_t a, uintptr_t b, int64_t n, bint product, uintptr_t out, int instruction_set, int threads,
) except *
cpdef void rotate(
    uintptr_t x, int64_t rows, int64_t heads, int64_t width, uintptr_t cos, uintptr_t sin, bint back, uintptr_t out,
    int instruction_set, int threads,
) except *
cpdef void select_rows(
    uintptr_t x, uintptr_t places, int64_t count, int64_t width, uintptr_t out, int threads,
) except *
cpdef void spread_rows(
    uintptr_t x, uintptr_t places, int64_t count, int64_t rows, int64_t width, uintptr_t out,
) except *
