"""Queries over heads and rows on threads. Tensors arrive as addresses; attention.py owns shapes."""

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc

from rlhf_kernels.cpu._rows cimport enter_rounding, kernels, leave_rounding, row_kernels

cdef int64_t LANES = 16
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
    double scale, float *turned, float *scratch, float *out, float *log_sums,
) noexcept nogil:
    """Causal attention of one row and one key-value head, by the ``group`` heads that share it."""
    cdef int64_t room = room_for(tokens), i, d, h
    for i in range(tokens):
        put_key(keys + i * key_stride, width, turned, i)
    for i in range(tokens, room):
        for d in range(width):
            turned[(i // LANES * width + d) * LANES + i % LANES] = 0.0
    for h in range(group):
        for i in range(tokens):
            k.attend(
                queries + i * query_stride + h * width, width, turned, values, value_stride, i + 1, scale,
                scratch, out + (i * heads + h) * width, log_sums + i * heads + h)


def attend_rows(
    uintptr_t queries, uintptr_t keys, uintptr_t values, uintptr_t starts, int64_t rows, int64_t longest,
    int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t heads, int64_t group, int64_t width,
    double scale, uintptr_t out, uintptr_t log_sums, int instruction_set, int threads,
) -> None:
    """Fill out[N, heads, width] and log_sums[N, heads]; row r has the tokens starts[r] ... starts[r + 1]."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef const int64_t *start = <const int64_t *>starts
    cdef int64_t shared = heads // group, pieces = rows * shared, room = room_for(longest), p, first, g
    cdef int64_t size = (width + 1) * room
    cdef uint32_t saved = 0
    cdef int workers = threads_for(pieces, rows * heads * longest * longest * width, threads)
    cdef float *memory = <float *>malloc(<size_t>(workers * size) * sizeof(float))
    if memory == NULL and pieces > 0:
        raise MemoryError(f"no memory for {workers} times {room} keys of {width}")
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
                    <float *>out + (first * heads + g * group) * width, <float *>log_sums + first * heads + g * group)
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


def attend_cached(
    uintptr_t queries, uintptr_t key, uintptr_t value, uintptr_t keys, uintptr_t values, uintptr_t lengths,
    int64_t rows, int64_t longest, int64_t room, int64_t query_stride, int64_t key_stride, int64_t value_stride,
    int64_t heads, int64_t group, int64_t width, double scale, uintptr_t out, int instruction_set, int threads,
) -> None:
    """Fill out[rows, heads, width]; keys[rows, shared, room / 16, width, 16] and values[rows, shared, room, width] grow."""
    cdef const row_kernels *k = kernels(instruction_set)
    cdef const int64_t *length = <const int64_t *>lengths
    cdef int64_t shared = heads // group, pieces = rows * shared, p, r, g
    cdef uint32_t saved = 0
    cdef int workers = threads_for(pieces, 2 * rows * heads * longest * width, threads)
    cdef float *memory = <float *>malloc(<size_t>(workers * room) * sizeof(float))
    if memory == NULL and pieces > 0:
        raise MemoryError(f"no memory for {workers} times {room} scores")
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
