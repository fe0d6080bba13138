/* Attention of one query, in one order whatever stands beside it: over a cache and over a whole row alike.
 *
 * Vaswani et al. (2017), eq. 1. Lanes are keys for the scores and elements of a value for the mean, so nothing is added
 * across lanes but the sixteen parts of the denominator.
 */
#ifndef RLHF_ATTENTION_H
#define RLHF_ATTENTION_H

#include "arithmetic.h"

#define TURNED_KEYS 4 /* vectors of keys whose scores are computed side by side */

/* scores[0 ... 16 n) = query · key, the products added in the order of the width. */
INLINE void scores_of(const float *query, int64_t width, const float *keys, int n, float *scores) {
    lanes sum[TURNED_KEYS];
    for (int v = 0; v < n; v++) sum[v] = lanes_set(0.0f);
    for (int64_t d = 0; d < width; d++) {
        const lanes q = lanes_set(query[d]);
        for (int v = 0; v < n; v++) sum[v] = lanes_fma(q, lanes_load(keys + (v * width + d) * LANES), sum[v]);
    }
    for (int v = 0; v < n; v++) lanes_store(scores + v * LANES, sum[v]);
}

/* out[0 ... 16 n) = Σ weight · value, added in the order of the keys; `last` < 16 where the value ends inside a vector. */
INLINE void mean_of(const float *weights, int64_t count, const float *values, int64_t value_stride, int n,
                    float one_over_sum, float *out) {
    lanes sum[TURNED_KEYS];
    for (int v = 0; v < n; v++) sum[v] = lanes_set(0.0f);
    for (int64_t j = 0; j < count; j++) {
        const lanes w = lanes_set(weights[j]);
        for (int v = 0; v < n; v++) sum[v] = lanes_fma(w, lanes_load(values + j * value_stride + v * LANES), sum[v]);
    }
    for (int v = 0; v < n; v++) lanes_store(out + v * LANES, lanes_mul(sum[v], lanes_set(one_over_sum)));
}

/* The same for fewer than sixteen elements. */
NOT_INLINE void mean_of_some(const float *weights, int64_t count, const float *values, int64_t value_stride, int64_t some,
                             float one_over_sum, float *out) {
    lanes sum = lanes_set(0.0f);
    float padded[LANES] = {0};
    for (int64_t j = 0; j < count; j++) {
        memcpy(padded, values + j * value_stride, (size_t)some * sizeof(float));
        sum = lanes_fma(lanes_set(weights[j]), lanes_load(padded), sum);
    }
    lanes_store(padded, lanes_mul(sum, lanes_set(one_over_sum)));
    memcpy(out, padded, (size_t)some * sizeof(float));
}

/* keys[blocks, width, 16] have sixteen keys a block, each in a column, and anything finite behind the last; values of
 * `width` lie value_stride apart; scratch[16 blocks]. log_sum, where not NULL, becomes ln Σ exp(scale score). */
static void attend(const float *query, int64_t width, const float *keys, const float *values, int64_t value_stride,
                   int64_t count, double scale, float *scratch, float *out, float *log_sum) {
    int64_t j = 0, d = 0;
    const int64_t end = (count + LANES - 1) / LANES * LANES;
    for (; j + TURNED_KEYS * LANES <= end; j += TURNED_KEYS * LANES)
        scores_of(query, width, keys + j * width, TURNED_KEYS, scratch + j);
    for (; j < end; j += LANES) scores_of(query, width, keys + j * width, 1, scratch + j);
    for (j = count; j < end; j++) scratch[j] = -__builtin_inff();

    lanes most = lanes_load(scratch);
    for (j = LANES; j < end; j += LANES) most = lanes_max(most, lanes_load(scratch + j));
    const float largest = lanes_largest(most);
    const lanes scale_2 = lanes_set((float)(scale * LOG2_E)), shift = lanes_set(largest);
    lanes sums = lanes_set(0.0f);
    for (j = 0; j < end; j += LANES) {
        lanes t = lanes_mul(lanes_sub(lanes_load(scratch + j), shift), scale_2);
        lanes p = lanes_exp2(lanes_clamp_exponent(t));
        lanes_store(scratch + j, p);
        sums = lanes_add(sums, p);
    }
    const double sum = lanes_sum(sums);
    const float one_over_sum = (float)(1.0 / sum);
    for (; d + TURNED_KEYS * LANES <= width; d += TURNED_KEYS * LANES)
        mean_of(scratch, count, values + d, value_stride, TURNED_KEYS, one_over_sum, out + d);
    for (; d + LANES <= width; d += LANES) mean_of(scratch, count, values + d, value_stride, 1, one_over_sum, out + d);
    if (d < width) mean_of_some(scratch, count, values + d, value_stride, width - d, one_over_sum, out + d);
    if (log_sum) *log_sum = (float)((double)largest * scale + double_log2(sum) * LN_2);
}

#endif
