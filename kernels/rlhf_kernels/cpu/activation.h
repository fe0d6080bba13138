/* GELU and SiLU with their derivatives, a lane an element: both are x σ(z), z an odd function of x.
 *
 * σ(z) = 1 / (1 + e), e = 2^t, t = -z log2(e). Beyond ±30 the exponential is exactly 0 or infinite (in the derivative:
 * so large that nothing is left), so x is held there where it is cubed: nothing overflows, and NaN stays NaN.
 */
#ifndef RLHF_ACTIVATION_H
#define RLHF_ACTIVATION_H

#include "arithmetic.h"

enum activation { GELU = 0, SILU = 1 };

/* Hendrycks and Gimpel (2016), the approximation: z = 2 sqrt(2/pi) (x + 0.044715 x^3). */
#define GELU_LINEAR 0x1.988454p+0f
#define GELU_CUBE 0x1.6e4e26p-5f

INLINE lanes lanes_between(float low, lanes x, float high) {
    const lanes zero = lanes_set(0.0f);
    lanes negated = lanes_sub(zero, lanes_max(lanes_set(low), x));
    return lanes_sub(zero, lanes_max(lanes_set(-high), negated));
}

/* 2^t, t = -z log2(e), for z of an x between -30 and 30; 2^127 at most, or infinity from 2^127.5 on. */
INLINE lanes exponential_of_minus(lanes z, float largest) {
    return lanes_exp2(lanes_between(LOWEST_EXPONENT, lanes_mul(z, lanes_set((float)-LOG2_E)), largest));
}

INLINE lanes activation_argument(lanes x, enum activation kind) {
    if (kind == SILU) return lanes_between(-128.0f, x, 128.0f);
    lanes held = lanes_between(-30.0f, x, 30.0f);
    lanes factor = lanes_fma(lanes_mul(held, held), lanes_set(GELU_CUBE), lanes_set(1.0f));
    return lanes_mul(lanes_mul(held, lanes_set(GELU_LINEAR)), factor);
}

INLINE lanes activated(lanes x, enum activation kind) {
    lanes e = exponential_of_minus(activation_argument(x, kind), 128.0f);
    return lanes_div(x, lanes_add(lanes_set(1.0f), e));
}

/* d/dx x σ(z) = σ (1 + x z' (1 - σ)), and 1 - σ = e σ without cancellation. */
INLINE lanes activation_slope(lanes x, enum activation kind) {
    const lanes one = lanes_set(1.0f);
    lanes z = activation_argument(x, kind);
    lanes e = exponential_of_minus(z, 126.0f);
    lanes sigmoid = lanes_div(one, lanes_add(one, e));
    lanes x_slope = z; /* x z' = z for SiLU */
    if (kind == GELU) {
        lanes held = lanes_between(-30.0f, x, 30.0f);
        lanes factor = lanes_fma(lanes_mul(held, held), lanes_set(3.0f * GELU_CUBE), one);
        x_slope = lanes_mul(lanes_mul(held, lanes_set(GELU_LINEAR)), factor);
    }
    return lanes_mul(sigmoid, lanes_fma(x_slope, lanes_mul(e, sigmoid), one));
}

INLINE void activation_typed(const void *x, const void *grad, int64_t n, enum element_type type, enum activation kind,
                             void *out) {
    int64_t i = 0;
    for (; i < n; i += LANES) {
        const int64_t count = n - i < LANES ? n - i : LANES;
        const void *from = element_at(x, i, type), *upstream = grad ? element_at(grad, i, type) : 0;
        const int whole = count == LANES;
        lanes value = whole ? lanes_load_as(from, type) : lanes_load_some(from, count, type);
        lanes result;
        if (grad) {
            lanes g = whole ? lanes_load_as(upstream, type) : lanes_load_some(upstream, count, type);
            result = lanes_mul(g, activation_slope(value, kind));
        } else {
            result = activated(value, kind);
        }
        if (whole) {
            lanes_store_as((char *)out + i * element_bytes(type), result, type);
        } else {
            char padded[LANES * sizeof(float)];
            lanes_store_as(padded, result, type);
            memcpy((char *)out + i * element_bytes(type), padded, (size_t)(count * element_bytes(type)));
        }
    }
}

INLINE void activation_of_kind(const void *x, const void *grad, int64_t n, int type, enum activation kind, void *out) {
    if (type == F32) grad ? activation_typed(x, grad, n, F32, kind, out) : activation_typed(x, 0, n, F32, kind, out);
    else grad ? activation_typed(x, grad, n, BF16, kind, out) : activation_typed(x, 0, n, BF16, kind, out);
}

static void activation(const void *x, const void *grad, int64_t n, int type, int kind, void *out) {
    if (kind == GELU) activation_of_kind(x, grad, n, type, GELU, out);
    else activation_of_kind(x, grad, n, type, SILU, out);
}

#endif
