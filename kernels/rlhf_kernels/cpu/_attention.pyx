"""Queries over heads and rows on threads. Tensors arrive as addresses; attention.py owns shapes."""

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from rlhf_kernels.cpu._rows cimport LANES, QUERIES, enter_rounding, floats, kernels, leave_rounding, row_kernels

# Below this many products a second thread costs more than it saves.
cdef int64_t PRODUCTS_A_THREAD = 262144


cdef int threads_for(int64_t pieces, int64_t products, int threads) noexcept nogil:
    return <int>max(1, min(min(pieces, products // PRODUCTS_A_THREAD), threads))


cdef int64_t room_for(int64_t tokens) noexcept nogil:
    return (tokens + LANES - 1) // LANES * LANES


cdef void put_key(const float *key, int64_t width, float *keys, int64_t at) noexcept nogil:
    """Make the key a column of its block of sixteen."""
    cdef float *block = keys + at // LANES * LANES * width + at % LANES
    cdef int64_t d
    for d in range(width):
        block[d * LANES] = key[d]


cdef void row_of_queries(
    const row_kernels *k, const float *queries, const float *keys, const float *values, int64_t tokens,
    int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads, int64_t group, int64_t width,
    double scale, float *turned, float *scratch, float *out, float *softmax,
) noexcept nogil:
    """Causal attention of one row and one key-value head, by the ``group`` heads that share it."""
    cdef int64_t i, h
    k.turn(keys, tokens, key_stride, width, turned)
    for h in range(group):
        for i in range(tokens):
            k.attend(
                queries + i * query_stride + h * width, width, turned, values, value_stride, i + 1, scale,
                scratch, out + (i * heads + h) * width, softmax + 2 * (i * heads + h))


cdef int64_t longest_of(const int64_t *start, int64_t rows) noexcept nogil:
    cdef int64_t longest = 0, r
    for r in range(rows):
        longest = max(longest, start[r + 1] - start[r])
    return longest


cpdef void attend_rows(
    uintptr_t queries, uintptr_t keys, uintptr_t values, uintptr_t starts, int64_t rows, int64_t query_stride,
    int64_t key_stride, int64_t value_stride, int64_t heads, int64_t group, int64_t width, double scale, uintptr_t out,
    uintptr_t softmax, int instruction_set, int threads,
) except *:
    """Fill out[N, heads, width] and softmax[N, heads, 2]; row r has the tokens starts[r] ... starts[r + 1]."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef const int64_t *start = <const int64_t *>starts
    cdef int64_t shared = heads // group, pieces = rows * shared, longest = longest_of(start, rows), p, first, g
    cdef int64_t room = room_for(longest), size = (width + 1) * room
    cdef uint32_t saved = 0
    cdef int workers = threads_for(pieces, rows * heads * longest * longest * width, threads)
    cdef float *memory = floats(workers * size)
    with nogil:
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for p in prange(pieces, schedule="static"):
                first = start[p // shared]
                g = p % shared
                row_of_queries(
                    k, <const float *>queries + first * query_stride + g * group * width,
                    <const float *>keys + first * key_stride + g * width,
                    <const float *>values + first * value_stride + g * width,
                    start[p // shared + 1] - first, query_stride, key_stride, value_stride, heads, group, width, scale,
                    memory + threadid() * size, memory + threadid() * size + width * room,
                    <float *>out + (first * heads + g * group) * width,
                    <float *>softmax + 2 * (first * heads + g * group))
            leave_rounding(saved)
        free(memory)


cdef void copy_rows(
    const float *rows, int64_t count, int64_t stride, int64_t width, float *out, int64_t out_stride,
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        memcpy(out + i * out_stride, rows + i * stride, <size_t>width * sizeof(float))


cdef void gradients_of_row(
    const row_kernels *k, const float *queries, const float *keys, const float *values, const float *grads,
    const float *softmax, int64_t tokens, int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads,
    int64_t group, int64_t width, double scale, float *memory, float *grad_queries, float *grad_keys,
    float *grad_values, int64_t grad_query_stride, int64_t grad_key_stride, int64_t grad_value_stride,
) noexcept nogil:
    """Gradients of :func:`row_of_queries`; ``memory`` has room for all that stands in it below."""
    cdef int64_t room = room_for(tokens), padded = room_for(width), h, i, n
    cdef float *padded_keys = memory
    cdef float *to_keys = padded_keys + room * padded
    cdef float *to_values = to_keys + room * padded
    cdef float *some_queries = to_values + room * padded
    cdef float *some_grads = some_queries + QUERIES * padded
    cdef float *to_queries = some_grads + QUERIES * padded
    cdef float *turned_keys = to_queries + QUERIES * padded
    cdef float *turned_values = turned_keys + room * width
    cdef float *weights = turned_values + room * width
    cdef float *slopes = weights + QUERIES * room
    memset(memory, 0, <size_t>((3 * room + 3 * QUERIES) * padded) * sizeof(float))
    copy_rows(keys, tokens, key_stride, width, padded_keys, padded)
    k.turn(keys, tokens, key_stride, width, turned_keys)
    k.turn(values, tokens, value_stride, width, turned_values)
    for h in range(group):
        i = 0
        while i < tokens:
            n = min(QUERIES, tokens - i)
            if n < QUERIES:
                memset(some_queries, 0, <size_t>(2 * QUERIES * padded) * sizeof(float))
            copy_rows(queries + i * query_stride + h * width, n, query_stride, width, some_queries, padded)
            copy_rows(grads + (i * heads + h) * width, n, heads * width, width, some_grads, padded)
            k.attend_backward(
                some_queries, some_grads, softmax + 2 * (i * heads + h), 2 * heads, n, i, width, padded, turned_keys,
                turned_values, padded_keys, scale, room, weights, slopes, to_queries, to_keys, to_values)
            copy_rows(
                to_queries, n, padded, width, grad_queries + i * grad_query_stride + h * width, grad_query_stride)
            i += QUERIES
    copy_rows(to_keys, tokens, padded, width, grad_keys, grad_key_stride)
    copy_rows(to_values, tokens, padded, width, grad_values, grad_value_stride)


cpdef void attend_rows_backward(
    uintptr_t queries, uintptr_t keys, uintptr_t values, uintptr_t grads, uintptr_t softmax, uintptr_t starts,
    int64_t rows, int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads, int64_t group,
    int64_t width, double scale, uintptr_t grad_queries, uintptr_t grad_keys, uintptr_t grad_values,
    int64_t grad_query_stride, int64_t grad_key_stride, int64_t grad_value_stride, int instruction_set, int threads,
) except *:
    """Fill the gradients of attend_rows, [N, heads, width] and twice [N, shared, width], from grads[N, heads, width]."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef const int64_t *start = <const int64_t *>starts
    cdef int64_t shared = heads // group, pieces = rows * shared, longest = longest_of(start, rows), p, first, g
    cdef int64_t room = room_for(longest)
    cdef int64_t size = 3 * (room + QUERIES) * room_for(width) + 2 * room * (width + QUERIES)
    cdef uint32_t saved = 0
    cdef int workers = threads_for(pieces, 3 * rows * heads * longest * longest * width, threads)
    cdef float *memory = floats(workers * size)
    with nogil:
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for p in prange(pieces, schedule="static"):
                first = start[p // shared]
                g = p % shared
                gradients_of_row(
                    k, <const float *>queries + first * query_stride + g * group * width,
                    <const float *>keys + first * key_stride + g * width,
                    <const float *>values + first * value_stride + g * width,
                    <const float *>grads + (first * heads + g * group) * width,
                    <const float *>softmax + 2 * (first * heads + g * group), start[p // shared + 1] - first,
                    query_stride, key_stride, value_stride, heads, group, width, scale, memory + threadid() * size,
                    <float *>grad_queries + first * grad_query_stride + g * group * width,
                    <float *>grad_keys + first * grad_key_stride + g * width,
                    <float *>grad_values + first * grad_value_stride + g * width, grad_query_stride, grad_key_stride,
                    grad_value_stride)
            leave_rounding(saved)
        free(memory)


cdef void one_query(
    const row_kernels *k, const float *queries, const float *key, const float *value, float *keys, float *values,
    int64_t length, int64_t group, int64_t width, double scale, float *scratch, float *out,
) noexcept nogil:
    """Put a key and a value behind those that are there, and attend to all."""
    cdef int64_t d, h
    put_key(key, width, keys, length)
    for d in range(width):
        values[length * width + d] = value[d]
    for h in range(group):
        k.attend(queries + h * width, width, keys, values, width, length + 1, scale, scratch, out + h * width, NULL)


cpdef void attend_cached(
    uintptr_t queries, uintptr_t key, uintptr_t value, uintptr_t keys, uintptr_t values, uintptr_t lengths,
    int64_t rows, int64_t room, int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads,
    int64_t group, int64_t width, double scale, uintptr_t out, int instruction_set, int threads,
) except *:
    """Fill out[rows, heads, width]; keys[rows, shared, room / 16, width, 16] and values[rows, shared, room, width] grow.

    Raises:
        ValueError: a row has no room for one more token, and nothing was written.
    """
    cdef const row_kernels *k = kernels(instruction_set)
    cdef const int64_t *length = <const int64_t *>lengths
    cdef int64_t shared = heads // group, pieces = rows * shared, longest = 0, p, r, g
    cdef uint32_t saved = 0
    for r in range(rows):
        longest = max(longest, length[r] + 1)
    if longest > room:
        raise ValueError(f"the cache has room for {room} tokens a row, and a row has {longest}")
    cdef int workers = threads_for(pieces, 2 * rows * heads * longest * width, threads)
    cdef float *memory = floats(workers * room)
    with nogil:
        with parallel(num_threads=workers):
            saved = enter_rounding()
            for p in prange(pieces, schedule="static"):
                r = p // shared
                g = p % shared
                one_query(
                    k, <const float *>queries + r * query_stride + g * group * width,
                    <const float *>key + r * key_stride + g * width,
                    <const float *>value + r * value_stride + g * width,
                    <float *>keys + p * width * room, <float *>values + p * width * room, length[r], group, width, scale,
                    memory + threadid() * room, <float *>out + (r * heads + g * group) * width)
            leave_rounding(saved)
        free(memory)
