/* Mean, variance and scaling over the masked elements of a chunk, in eight float64 lanes with a fixed tree. */
#ifndef RLHF_WHITEN_H
#define RLHF_WHITEN_H

#include <stdint.h>

#include "lanes.h"

#define DOUBLE_LANES 8

INLINE double tree_sum(const double *d) {
    return ((d[0] + d[4]) + (d[2] + d[6])) + ((d[1] + d[5]) + (d[3] + d[7]));
}

#define WHITEN_CHUNK(sum_name, squares_name, scale_name, real)                                                          \
    static void sum_name(const real *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum) {                 \
        double lane[DOUBLE_LANES] = {0};                                                                               \
        int64_t inside = 0;                                                                                            \
        for (int64_t i = 0; i < n; i += DOUBLE_LANES)                                                                  \
            for (int64_t j = 0; j < DOUBLE_LANES && i + j < n; j++) {                                                  \
                lane[j] += mask[i + j] ? (double)x[i + j] : 0.0;                                                       \
                inside += mask[i + j] != 0;                                                                            \
            }                                                                                                          \
        *count = inside;                                                                                               \
        *sum = tree_sum(lane);                                                                                         \
    }                                                                                                                  \
    static double squares_name(const real *x, const uint8_t *mask, int64_t n, double mean) {                           \
        double lane[DOUBLE_LANES] = {0};                                                                               \
        for (int64_t i = 0; i < n; i += DOUBLE_LANES)                                                                  \
            for (int64_t j = 0; j < DOUBLE_LANES && i + j < n; j++) {                                                  \
                double deviation = mask[i + j] ? (double)x[i + j] - mean : 0.0;                                        \
                lane[j] += deviation * deviation;                                                                      \
            }                                                                                                          \
        return tree_sum(lane);                                                                                         \
    }                                                                                                                  \
    static void scale_name(const real *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,     \
                           real *out) {                                                                                \
        for (int64_t i = 0; i < n; i++)                                                                                \
            out[i] = mask[i] ? (real)(((double)x[i] - mean) * scale + shift) : (real)0;                                \
    }

WHITEN_CHUNK(sum_float, squares_float, scale_float, float)
WHITEN_CHUNK(sum_double, squares_double, scale_double, double)

#endif
