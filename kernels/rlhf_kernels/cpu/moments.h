/* One read of a row of logits: its maximum, Σ 2^t and Σ t 2^t for t = (x - maximum) * scale, block by block.
 *
 * Online normaliser: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3, with a block instead of an element as
 * its step. Inside a block the sums run in 2 x 16 float32 lanes, an element's lane being its position in the block;
 * blocks are joined in float64. The order of every addition is therefore fixed by the length of the row alone.
 */
#ifndef RLHF_MOMENTS_H
#define RLHF_MOMENTS_H

#include "arithmetic.h"
#include "rows.h"

/* 8 KiB of float32: a block stays in the first-level cache between its two passes. Part of the numerics: changing it
 * changes bits. */
#define BLOCK 2048

typedef struct {
    float largest;   /* -inf for a row without a number above it */
    double sum;      /* >= 1, or NaN */
    double weighted; /* <= 0 */
} moments;

/* What `sample` keeps of each block: its sum, in units of 2^((reference - largest) * scale). */
typedef struct {
    float reference;
    double sum;
} block_record;

/* Sixteen elements as float32. Numbers of 16 bits are kept in `wide_copy`, which spares the second pass the conversion. */
INLINE lanes load_first_pass(const void *x, int64_t i, enum element_type type, float *wide_copy) {
    const lanes v = lanes_load_as(element_at(x, i, type), type);
    if (type != F32) lanes_store(wide_copy + i, v);
    return v;
}

INLINE float block_largest(const void *x, int64_t n, enum element_type type, float *wide_copy) {
    const int64_t step = 4 * LANES;
    lanes a = lanes_set(-__builtin_inff()), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        /* the accumulator is the second operand, so that a NaN is passed over: the sums will show it */
        a = lanes_max(load_first_pass(x, i, type, wide_copy), a);
        b = lanes_max(load_first_pass(x, i + LANES, type, wide_copy), b);
        c = lanes_max(load_first_pass(x, i + 2 * LANES, type, wide_copy), c);
        d = lanes_max(load_first_pass(x, i + 3 * LANES, type, wide_copy), d);
    }
    for (; i + LANES <= n; i += LANES) a = lanes_max(load_first_pass(x, i, type, wide_copy), a);
    if (i < n) {
        const lanes rest = lanes_load_some(element_at(x, i, type), n - i, type);
        if (type != F32) lanes_store(wide_copy + i, rest);
        b = lanes_max(rest, b);
    }
    return lanes_largest(lanes_max(lanes_max(a, b), lanes_max(c, d)));
}

typedef struct {
    lanes sum, weighted;
} lane_sums;

INLINE lane_sums lane_sums_add(lane_sums s, lanes x, lanes reference, lanes scale, int weighted) {
    lanes t = lanes_clamp_exponent(lanes_mul(lanes_sub(x, reference), scale));
    lanes e = lanes_exp2(t);
    s.sum = lanes_add(s.sum, e);
    if (weighted) s.weighted = lanes_fma(e, t, s.weighted);
    return s;
}

/* x has float32 elements: the row's own, or their copy. `fetch` is where the row's elements of this block are. */
INLINE void block_sums(const float *x, int64_t n, const void *fetch, enum element_type type, float reference, float scale,
                       int weighted, double *sum, double *weighted_sum) {
    const lanes ref = lanes_set(reference), by = lanes_set(scale);
    lane_sums even = {lanes_set(0.0f), lanes_set(0.0f)}, odd = even;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        /* fetch the next block while this one is computed */
        __builtin_prefetch(element_at(fetch, i + BLOCK, type), 0, 3);
        if (type == F32) __builtin_prefetch(element_at(fetch, i + BLOCK + LANES, type), 0, 3);
        even = lane_sums_add(even, lanes_load(x + i), ref, by, weighted);
        odd = lane_sums_add(odd, lanes_load(x + i + LANES), ref, by, weighted);
    }
    if (i + LANES <= n) {
        even = lane_sums_add(even, lanes_load(x + i), ref, by, weighted);
        i += LANES;
    }
    if (i < n) {
        const lanes rest = type == F32 ? lanes_load_some(x + i, n - i, F32) : lanes_load(x + i);
        odd = lane_sums_add(odd, rest, ref, by, weighted);
    }
    *sum = lanes_sum(lanes_add(even.sum, odd.sum));
    *weighted_sum = weighted ? lanes_sum(lanes_add(even.weighted, odd.weighted)) : 0.0;
}

#define NO_MOMENTS ((moments){-__builtin_inff(), 0.0, 0.0})

/* The moments of a row whose first part has the moments m, and is followed by these elements. Only where every part but
 * the last is a multiple of BLOCK are the bits those of the whole row. `records`, where not NULL, takes one a block. */
INLINE moments row_moments(moments m, const void *row, int64_t vocabulary, enum element_type type, float scale,
                           int weighted, block_record *records) {
    float wide_copy[BLOCK];
    for (int64_t start = 0; start < vocabulary; start += BLOCK) {
        const void *x = element_at(row, start, type);
        int64_t n = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
        float largest = block_largest(x, n, type, wide_copy);
        if (largest > m.largest) {
            double change = ((double)m.largest - (double)largest) * (double)scale; /* -inf for the first block */
            double factor = m.largest == -__builtin_inff() ? 0.0 : double_exp2(change);
            m.weighted = factor == 0.0 ? 0.0 * m.sum : factor * (m.weighted + change * m.sum);
            m.sum *= factor;
            m.largest = largest;
        }
        float reference = reference_of(m.largest);
        double sum, weighted_sum;
        block_sums(type == F32 ? (const float *)x : wide_copy, n, x, type, reference, scale, weighted, &sum,
                   &weighted_sum);
        m.sum += sum;
        m.weighted += weighted_sum;
        if (records) *records++ = (block_record){reference, sum};
    }
    return m;
}

/* The same of several rows of at most SHORT elements. What each row would wait for, joining its lanes, goes on beside the
 * other rows. */
INLINE void moments_of_short_rows(const void *const *rows, int64_t count, int64_t n, enum element_type type, float scale,
                                  int weighted, moments *m) {
    float wide_copy[SHORT_ROWS * SHORT];
    const int64_t stride = (n + LANES - 1) / LANES * LANES;
    for (int64_t r = 0; r < count; r++) m[r].largest = block_largest(rows[r], n, type, wide_copy + r * stride);
    for (int64_t r = 0; r < count; r++) {
        const float *x = type == F32 ? (const float *)rows[r] : wide_copy + r * stride;
        block_sums(x, n, rows[r], type, reference_of(m[r].largest), scale, weighted, &m[r].sum, &m[r].weighted);
    }
}

INLINE int is_distribution(moments m) { return sums_are_of_a_distribution(m.largest, m.sum); }

#endif
