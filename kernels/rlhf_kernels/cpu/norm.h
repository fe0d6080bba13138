/* Layer norm and RMS norm of rows, their gradients, and sums over rows.
 *
 * Ba, Kiros and Hinton, "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019),
 * which leaves the mean out. Sums over a row are made in sixteen float64 lanes, element i in lane i mod 16, and a fixed
 * tree.
 */
#ifndef RLHF_NORM_H
#define RLHF_NORM_H

#include <math.h>

#include "lanes.h"

typedef struct {
    wide low, high;
} row_sum;

INLINE row_sum row_sum_of(lanes x) { return (row_sum){wide_from_low(x), wide_from_high(x)}; }
INLINE row_sum row_sum_add(row_sum sum, lanes x) {
    return (row_sum){wide_add(sum.low, wide_from_low(x)), wide_add(sum.high, wide_from_high(x))};
}
INLINE double row_sum_total(row_sum sum) { return wide_sum(wide_add(sum.low, sum.high)); }

/* The elements from i on, `count` of them, zeros behind the last. */
INLINE lanes lanes_from(const float *x, int64_t i, int64_t count) {
    if (count >= LANES) return lanes_load(x + i);
    float padded[LANES] = {0};
    memcpy(padded, x + i, (size_t)count * sizeof(float));
    return lanes_load(padded);
}
INLINE void lanes_to(float *x, int64_t i, int64_t count, lanes value) {
    if (count >= LANES) {
        lanes_store(x + i, value);
    } else {
        float padded[LANES];
        lanes_store(padded, value);
        memcpy(x + i, padded, (size_t)count * sizeof(float));
    }
}

/* x - mean, 0 behind the end. */
INLINE lanes deviation_from(const float *x, int64_t i, int64_t count, lanes mean) {
    static const float inside[2 * LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const lanes deviation = lanes_sub(lanes_from(x, i, count), mean);
    return count >= LANES ? deviation : lanes_mul(deviation, lanes_load(inside + LANES - count));
}

/* The mean, 0 where it is left out, and 1 / √(mean square deviation + ε). */
INLINE void norm_statistics(const float *x, int64_t width, double epsilon, int centered, lanes *mean, lanes *factor) {
    *mean = lanes_set(0.0f);
    if (centered) {
        row_sum sum = row_sum_of(*mean);
        for (int64_t i = 0; i < width; i += LANES) sum = row_sum_add(sum, lanes_from(x, i, width - i));
        *mean = lanes_set((float)(row_sum_total(sum) / (double)width));
    }
    row_sum squares = row_sum_of(lanes_set(0.0f));
    for (int64_t i = 0; i < width; i += LANES) {
        const lanes deviation = deviation_from(x, i, width - i, *mean);
        squares = row_sum_add(squares, lanes_mul(deviation, deviation));
    }
    *factor = lanes_set((float)(1.0 / sqrt(row_sum_total(squares) / (double)width + epsilon)));
}

/* out[rows, width] = (x - mean) / √(variance + ε) · weight + bias; bias may be NULL, and out may be x. */
static void norm(const float *x, int64_t rows, int64_t width, const float *weight, const float *bias, double epsilon,
                 int centered, float *out) {
    for (int64_t r = 0; r < rows; r++, x += width, out += width) {
        lanes mean, factor;
        norm_statistics(x, width, epsilon, centered, &mean, &factor);
        for (int64_t i = 0; i < width; i += LANES) {
            const lanes normalized = lanes_mul(lanes_sub(lanes_from(x, i, width - i), mean), factor);
            const lanes scaled = lanes_mul(normalized, lanes_from(weight, i, width - i));
            lanes_to(out, i, width - i, bias ? lanes_add(scaled, lanes_from(bias, i, width - i)) : scaled);
        }
    }
}

/* Gradients of `norm`: grad_x[rows, width], and added to sums[2, width] those of weight and bias. */
static void norm_gradients(const float *x, const float *grad, int64_t rows, int64_t width, const float *weight,
                           double epsilon, int centered, float *grad_x, float *sums) {
    for (int64_t r = 0; r < rows; r++, x += width, grad += width, grad_x += width) {
        lanes mean, factor;
        norm_statistics(x, width, epsilon, centered, &mean, &factor);
        row_sum slopes = row_sum_of(lanes_set(0.0f)), along = slopes; /* of the normalized row; along itself */
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t count = width - i;
            const lanes g = lanes_from(grad, i, count), slope = lanes_mul(g, lanes_from(weight, i, count));
            const lanes normalized = lanes_mul(lanes_sub(lanes_from(x, i, count), mean), factor);
            const lanes to_weight = lanes_fma(g, normalized, lanes_from(sums, i, count));
            lanes_to(sums, i, count, to_weight);
            lanes_to(sums + width, i, count, lanes_add(lanes_from(sums + width, i, count), g));
            slopes = row_sum_add(slopes, slope);
            along = row_sum_add(along, lanes_mul(slope, normalized));
        }
        const lanes mean_slope = lanes_set(centered ? (float)(row_sum_total(slopes) / (double)width) : 0.0f);
        const lanes mean_along = lanes_set((float)(row_sum_total(along) / (double)width));
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t count = width - i;
            const lanes slope = lanes_mul(lanes_from(grad, i, count), lanes_from(weight, i, count));
            const lanes normalized = lanes_mul(lanes_sub(lanes_from(x, i, count), mean), factor);
            const lanes rest = lanes_sub(lanes_sub(slope, mean_slope), lanes_mul(normalized, mean_along));
            lanes_to(grad_x, i, count, lanes_mul(rest, factor));
        }
    }
}

/* out[columns] = the sums of x[rows, columns], whose rows lie `stride` apart, row after row in float64. */
static void column_sums(const float *x, int64_t rows, int64_t columns, int64_t stride, float *out) {
    for (int64_t i = 0; i < columns; i += LANES) {
        const int64_t count = columns - i;
        row_sum sum = row_sum_of(lanes_set(0.0f));
        for (int64_t r = 0; r < rows; r++) sum = row_sum_add(sum, lanes_from(x + r * stride, i, count));
        lanes_to(out, i, count, lanes_from_wide(sum.low, sum.high));
    }
}

#endif
