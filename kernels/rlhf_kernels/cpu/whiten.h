/* Mean, variance and scaling over the masked elements of a chunk, in eight float64 lanes with a fixed tree. */
#ifndef RLHF_WHITEN_H
#define RLHF_WHITEN_H

#include <stdint.h>

#include "../shared/scalar.h"
#include "lanes.h"

#define DOUBLE_LANES 8

INLINE double tree_sum(const double *d) {
    return ((d[0] + d[4]) + (d[2] + d[6])) + ((d[1] + d[5]) + (d[3] + d[7]));
}

/* `last` is the constant 8 in all steps but a row's final one, so that the compiler makes vectors of them. */
#define WHITEN_CHUNK(sum_name, squares_name, scale_name, real)                                                          \
    INLINE void sum_name##_step(const real *x, const uint8_t *mask, int64_t last, double *lane, int64_t *inside) {     \
        for (int64_t j = 0; j < last; j++) {                                                                           \
            lane[j] += mask[j] ? (double)x[j] : 0.0;                                                                   \
            inside[j] += mask[j] != 0;                                                                                 \
        }                                                                                                              \
    }                                                                                                                  \
    static void sum_name(const real *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum) {                 \
        double lane[DOUBLE_LANES] = {0};                                                                               \
        int64_t inside[DOUBLE_LANES] = {0}, i = 0;                                                                     \
        for (; i + DOUBLE_LANES <= n; i += DOUBLE_LANES) sum_name##_step(x + i, mask + i, DOUBLE_LANES, lane, inside); \
        sum_name##_step(x + i, mask + i, n - i, lane, inside);                                                         \
        *count = 0;                                                                                                    \
        for (int64_t j = 0; j < DOUBLE_LANES; j++) *count += inside[j];                                                \
        *sum = tree_sum(lane);                                                                                         \
    }                                                                                                                  \
    INLINE void squares_name##_step(const real *x, const uint8_t *mask, int64_t last, double mean, double *lane) {     \
        for (int64_t j = 0; j < last; j++) {                                                                           \
            double deviation = (double)x[j] - mean;                                                                    \
            deviation = mask[j] ? deviation : 0.0;                                                                     \
            lane[j] += deviation * deviation;                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static double squares_name(const real *x, const uint8_t *mask, int64_t n, double mean) {                           \
        double lane[DOUBLE_LANES] = {0};                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + DOUBLE_LANES <= n; i += DOUBLE_LANES) squares_name##_step(x + i, mask + i, DOUBLE_LANES, mean, lane); \
        squares_name##_step(x + i, mask + i, n - i, mean, lane);                                                       \
        return tree_sum(lane);                                                                                         \
    }                                                                                                                  \
    static void scale_name(const real *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,     \
                           real *out) {                                                                                \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            real scaled = (real)whitened_of((double)x[i], mean, scale, shift);                                         \
            out[i] = mask[i] ? scaled : (real)0;                                                                       \
        }                                                                                                              \
    }

WHITEN_CHUNK(sum_float, squares_float, scale_float, float)
WHITEN_CHUNK(sum_double, squares_double, scale_double, double)

#endif
