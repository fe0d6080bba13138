/* A matrix turned over, and the sum of its squares. */
#ifndef RLHF_MATRIX_H
#define RLHF_MATRIX_H

#include "lanes.h"

/* out[columns, rows] = x[rows, columns]ᵀ, of columns `first` to `last` of x: sixteen rows by four columns at a time. */
static void turn(const float *x, int64_t rows, int64_t columns, int64_t first, int64_t last, float *out) {
    int64_t r = 0;
    for (; r + LANES <= rows; r += LANES) {
        int64_t c = first;
        for (; c + 4 <= last; c += 4) {
            lanes square[4]; /* quarter q of square[j]: row r + 4 q + j */
            for (int j = 0; j < 4; j++) square[j] = lanes_load_quarters(x + (r + j) * columns + c, 4 * columns);
            lanes_turn_quarters(square);
            for (int j = 0; j < 4; j++) lanes_store(out + (c + j) * rows + r, square[j]);
        }
        for (; c < last; c++)
            for (int64_t i = r; i < r + LANES; i++) out[c * rows + i] = x[i * columns + c];
    }
    for (; r < rows; r++)
        for (int64_t c = first; c < last; c++) out[c * rows + r] = x[r * columns + c];
}

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
