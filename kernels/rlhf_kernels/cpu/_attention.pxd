"""What other extension modules call of _attention."""

from libc.stdint cimport int64_t, uintptr_t

cpdef void attend_rows(
    uintptr_t queries, uintptr_t keys, uintptr_t values, uintptr_t starts, int64_t rows, int64_t query_stride,
    int64_t key_stride, int64_t value_stride, int64_t heads, int64_t group, int64_t width, double scale, uintptr_t out,
    uintptr_t softmax, int instruction_set, int threads,
) except *
cpdef void attend_rows_backward(
    uintptr_t queries, uintptr_t keys, uintptr_t values, uintptr_t grads, uintptr_t softmax, uintptr_t starts,
    int64_t rows, int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads, int64_t group,
    int64_t width, double scale, uintptr_t grad_queries, uintptr_t grad_keys, uintptr_t grad_values,
    int64_t grad_query_stride, int64_t grad_key_stride, int64_t grad_value_stride, int instruction_set, int threads,
) except *
cpdef void attend_cached(
    uintptr_t queries, uintptr_t key, uintptr_t value, uintptr_t keys, uintptr_t values, uintptr_t lengths,
    int64_t rows, int64_t room, int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads,
    int64_t group, int64_t width, double scale, uintptr_t out, int instruction_set, int threads,
) except *
