/* A sum of squares. */
#ifndef RLHF_SQUARES_H
#define RLHF_SQUARES_H

#include "lanes.h"

/* Σ x² in eight float64 lanes, element i in lane i mod 8 of one of two, and a fixed tree. */
static double sum_of_squares(const float *x, int64_t n) {
    wide low = wide_set(0.0), high = wide_set(0.0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        wide a = wide_load_float(x + i), b = wide_load_float(x + i + 8);
        low = wide_add(low, wide_mul(a, a));
        high = wide_add(high, wide_mul(b, b));
    }
    double lane[8], rest = 0.0;
    wide_store(lane, wide_add(low, high));
    for (; i < n; i++) rest += (double)x[i] * (double)x[i];
    return (((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]))) + rest;
}

#endif
