/* Sums and products of matrices element by element, and rotary embeddings: each product rounded, then each sum. */
#ifndef RLHF_ELEMENTWISE_H
#define RLHF_ELEMENTWISE_H

#include "lanes.h"

/* out[n] = a + b, or a b; out may be either. */
static void combine(const float *a, const float *b, int64_t n, int product, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const lanes x = lanes_load(a + i), y = lanes_load(b + i);
        lanes_store(out + i, product ? lanes_mul(x, y) : lanes_add(x, y));
    }
    for (; i < n; i++) out[i] = product ? a[i] * b[i] : a[i] + b[i];
}

/* Su et al., "RoFormer" (2021), the halves of a head paired: out = (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), cos[width]
 * and sin[width] being those of a position. `back`: the gradient of x from that of out. */
static void rotate(const float *x, int64_t width, const float *cos, const float *sin, int back, float *out) {
    const int64_t half = width / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const lanes first = lanes_load(x + i), second = lanes_load(x + half + i);
        const lanes sin_1 = lanes_load(sin + i), sin_2 = lanes_load(sin + half + i);
        const lanes from_second = lanes_mul(second, back ? sin_2 : sin_1);
        const lanes from_first = lanes_mul(first, back ? sin_1 : sin_2);
        const lanes kept_1 = lanes_mul(first, lanes_load(cos + i));
        const lanes kept_2 = lanes_mul(second, lanes_load(cos + half + i));
        lanes_store(out + i, back ? lanes_add(kept_1, from_second) : lanes_sub(kept_1, from_second));
        lanes_store(out + half + i, back ? lanes_sub(kept_2, from_first) : lanes_add(kept_2, from_first));
    }
    for (; i < half; i++) {
        const float first = x[i], second = x[half + i];
        const float from_second = second * (back ? sin[half + i] : sin[i]);
        const float from_first = first * (back ? sin[i] : sin[half + i]);
        out[i] = back ? first * cos[i] + from_second : first * cos[i] - from_second;
        out[half + i] = back ? second * cos[half + i] - from_first : second * cos[half + i] + from_first;
    }
}

#endif
