/* Attention of one query, in one order whatever stands beside it: over a cache and over a whole row alike; and its
 * gradients, in the order of the queries of a row.
 *
 * Vaswani et al. (2017), eq. 1. Lanes are keys for the scores and elements of a value for the mean, so nothing is added
 * across lanes but the sixteen parts of the denominator and, in the gradients, of a query's mean slope.
 */
#ifndef RLHF_ATTENTION_H
#define RLHF_ATTENTION_H

#include "arithmetic.h"

#define SIDE_BY_SIDE 4 /* vectors whose sums are added up side by side: one sum waits for itself */

/* Calls f, whose argument n is one to SIDE_BY_SIDE vectors, with a number that the compiler knows. */
#define WITH_VECTORS(n, f, ...)         \
    switch (n) {                        \
        case 1: f(__VA_ARGS__, 1); break; \
        case 2: f(__VA_ARGS__, 2); break; \
        case 3: f(__VA_ARGS__, 3); break; \
        case 4: f(__VA_ARGS__, 4); break; \
    }

/* turned[blocks, width, 16]: rows of `width` lie `stride` apart, and each becomes a column of its block of sixteen, zeros
 * behind the last. */
static void turn(const float *rows, int64_t count, int64_t stride, int64_t width, float *turned) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        const float *block = rows + j * stride;
        int64_t d = 0;
        for (; d + 4 <= width; d += 4) {
            lanes square[4]; /* quarter q of square[i]: row 4 q + i */
            for (int i = 0; i < 4; i++) square[i] = lanes_load_quarters(block + i * stride + d, 4 * stride);
            lanes_turn_quarters(square);
            for (int i = 0; i < 4; i++) lanes_store(turned + j * width + (d + i) * LANES, square[i]);
        }
        for (; d < width; d++)
            for (int64_t i = 0; i < LANES; i++) turned[j * width + d * LANES + i] = block[i * stride + d];
    }
    for (int64_t d = 0; j < count && d < width; d++)
        for (int64_t i = 0; i < LANES; i++)
            turned[j * width + d * LANES + i] = j + i < count ? rows[(j + i) * stride + d] : 0.0f;
}

/* scores[0 ... 16 n) = query · key, the products added in the order of the width. */
INLINE void scores_of(const float *query, int64_t width, const float *keys, float *scores, int n) {
    lanes sum[SIDE_BY_SIDE];
    for (int v = 0; v < n; v++) sum[v] = lanes_set(0.0f);
    for (int64_t d = 0; d < width; d++) {
        const lanes q = lanes_set(query[d]);
        for (int v = 0; v < n; v++) sum[v] = lanes_fma(q, lanes_load(keys + (v * width + d) * LANES), sum[v]);
    }
    for (int v = 0; v < n; v++) lanes_store(scores + v * LANES, sum[v]);
}

/* out[0 ... 16 n) = Σ weight · value, added in the order of the keys. */
INLINE void mean_of(const float *weights, int64_t count, const float *values, int64_t value_stride, float one_over_sum,
                    float *out, int n) {
    lanes sum[SIDE_BY_SIDE];
    for (int v = 0; v < n; v++) sum[v] = lanes_set(0.0f);
    for (int64_t j = 0; j < count; j++) {
        const lanes w = lanes_set(weights[j]);
        for (int v = 0; v < n; v++) sum[v] = lanes_fma(w, lanes_load(values + j * value_stride + v * LANES), sum[v]);
    }
    for (int v = 0; v < n; v++) lanes_store(out + v * LANES, lanes_mul(sum[v], lanes_set(one_over_sum)));
}

/* The same for fewer than sixteen elements. */
NOT_INLINE void mean_of_some(const float *weights, int64_t count, const float *values, int64_t value_stride,
                             int64_t some, float one_over_sum, float *out) {
    lanes sum = lanes_set(0.0f);
    float padded[LANES] = {0};
    for (int64_t j = 0; j < count; j++) {
        memcpy(padded, values + j * value_stride, (size_t)some * sizeof(float));
        sum = lanes_fma(lanes_set(weights[j]), lanes_load(padded), sum);
    }
    lanes_store(padded, lanes_mul(sum, lanes_set(one_over_sum)));
    memcpy(out, padded, (size_t)some * sizeof(float));
}

/* scores[0 ... count), and on to a multiple of sixteen, of keys[blocks, width, 16]. */
INLINE void all_scores_of(const float *query, int64_t width, const float *keys, int64_t count, float *scores) {
    int64_t j = 0;
    for (; j + SIDE_BY_SIDE * LANES <= count; j += SIDE_BY_SIDE * LANES)
        scores_of(query, width, keys + j * width, scores + j, SIDE_BY_SIDE);
    WITH_VECTORS((count - j + LANES - 1) / LANES, scores_of, query, width, keys + j * width, scores + j)
}

/* exp(scale (score - largest)), but for the 1 / Σ that makes it a weight. */
INLINE lanes unscaled_weight(const float *score, lanes largest, lanes scale_2) {
    return lanes_exp2(lanes_clamp_exponent(lanes_mul(lanes_sub(lanes_load(score), largest), scale_2)));
}

/* keys[blocks, width, 16] have sixteen keys a block, each in a column, and anything finite behind the last; values of
 * `width` lie value_stride apart; scratch[16 blocks]. softmax[2], where not NULL, becomes the largest score and 1 / Σ of
 * the unscaled weights. */
static void attend(const float *query, int64_t width, const float *keys, const float *values, int64_t value_stride,
                   int64_t count, double scale, float *scratch, float *out, float *softmax) {
    int64_t j, d = 0;
    const int64_t end = (count + LANES - 1) / LANES * LANES;
    all_scores_of(query, width, keys, count, scratch);
    for (j = count; j < end; j++) scratch[j] = -__builtin_inff();

    lanes most = lanes_load(scratch);
    for (j = LANES; j < end; j += LANES) most = lanes_max(most, lanes_load(scratch + j));
    const float largest = lanes_largest(most);
    const lanes scale_2 = lanes_set((float)(scale * LOG2_E)), shift = lanes_set(largest);
    lanes sums = lanes_set(0.0f);
    for (j = 0; j < end; j += LANES) {
        const lanes p = unscaled_weight(scratch + j, shift, scale_2);
        lanes_store(scratch + j, p);
        sums = lanes_add(sums, p);
    }
    const float one_over_sum = (float)(1.0 / lanes_sum(sums));
    for (; d + SIDE_BY_SIDE * LANES <= width; d += SIDE_BY_SIDE * LANES)
        mean_of(scratch, count, values + d, value_stride, one_over_sum, out + d, SIDE_BY_SIDE);
    WITH_VECTORS((width - d) / LANES, mean_of, scratch, count, values + d, value_stride, one_over_sum, out + d)
    d = width / LANES * LANES;
    if (d < width) mean_of_some(scratch, count, values + d, value_stride, width - d, one_over_sum, out + d);
    if (softmax) softmax[0] = largest, softmax[1] = one_over_sum;
}

/* QUERIES together: a key's gradient is read and written once for them.
 *
 * Weights of a query over its row up to itself, and the slopes of the loss in its scores, zero from there to `end`:
 * slope = scale weight (grad · value - Σ weight (grad · value)), Dao, "FlashAttention-2" (2023), section 3.1.2. */
INLINE void slopes_of(const float *query, const float *grad, const float *softmax, int64_t width,
                      const float *turned_keys, const float *turned_values, int64_t count, int64_t end, double scale,
                      float *weights, float *slopes) {
    const lanes largest = lanes_set(softmax[0]), one_over_sum = lanes_set(softmax[1]);
    const lanes scale_2 = lanes_set((float)(scale * LOG2_E));
    const int64_t own = (count + LANES - 1) / LANES * LANES;
    all_scores_of(query, width, turned_keys, count, weights);
    all_scores_of(grad, width, turned_values, count, slopes);
    for (int64_t j = 0; j < own; j += LANES)
        lanes_store(weights + j, lanes_mul(unscaled_weight(weights + j, largest, scale_2), one_over_sum));
    for (int64_t j = count; j < end; j++) weights[j] = slopes[j] = 0.0f;
    lanes sums = lanes_set(0.0f);
    for (int64_t j = 0; j < own; j += LANES)
        sums = lanes_fma(lanes_load(weights + j), lanes_load(slopes + j), sums);
    const lanes mean = lanes_set((float)lanes_sum(sums)), factor = lanes_set((float)scale);
    for (int64_t j = 0; j < own; j += LANES) {
        const lanes p = lanes_load(weights + j);
        lanes_store(slopes + j, lanes_mul(lanes_mul(p, lanes_sub(lanes_load(slopes + j), mean)), factor));
    }
}

/* Gradients of up to four queries that stand at `first` and on in their row. Rows of queries, grads, keys and of all
 * gradients are `padded` apart, a multiple of sixteen, and zero behind `width`; queries and grads are zero where there are
 * fewer than four. softmax[4] as attend() gave them; weights[4, room] and slopes[4, room] are scratch. What the four add
 * to keys' and values' gradients is added in their order. */
static void attend_backward(const float *queries, const float *grads, const float *softmax, int64_t softmax_stride,
                            int64_t count, int64_t first, int64_t width, int64_t padded, const float *turned_keys,
                            const float *turned_values, const float *keys, double scale, int64_t room,
                            float *weights, float *slopes, float *grad_queries, float *grad_keys,
                            float *grad_values) {
    const int64_t seen = first + count, end = (seen + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < QUERIES; i++) {
        if (i < count)
            slopes_of(queries + i * padded, grads + i * padded, softmax + i * softmax_stride, width, turned_keys,
                      turned_values, first + i + 1, end, scale, weights + i * room, slopes + i * room);
        else
            for (int64_t j = 0; j < seen; j++) weights[i * room + j] = slopes[i * room + j] = 0.0f;
    }
    for (int64_t d = 0; d < padded; d += LANES) {
        lanes query[QUERIES], grad[QUERIES], sum[QUERIES];
        for (int i = 0; i < QUERIES; i++) {
            query[i] = lanes_load(queries + i * padded + d);
            sum[i] = lanes_set(0.0f);
        }
        for (int64_t j = 0; j < seen; j++) {
            const lanes key = lanes_load(keys + j * padded + d);
            lanes to_key = lanes_load(grad_keys + j * padded + d);
            for (int i = 0; i < QUERIES; i++) {
                const lanes slope = lanes_set(slopes[i * room + j]);
                sum[i] = lanes_fma(slope, key, sum[i]);
                to_key = lanes_fma(slope, query[i], to_key);
            }
            lanes_store(grad_keys + j * padded + d, to_key);
        }
        for (int i = 0; i < QUERIES; i++) {
            lanes_store(grad_queries + i * padded + d, sum[i]);
            grad[i] = lanes_load(grads + i * padded + d);
        }
        for (int64_t j = 0; j < seen; j++) {
            lanes to_value = lanes_load(grad_values + j * padded + d);
            for (int i = 0; i < QUERIES; i++) to_value = lanes_fma(lanes_set(weights[i * room + j]), grad[i], to_value);
            lanes_store(grad_values + j * padded + d, to_value);
        }
    }
}

#endif
