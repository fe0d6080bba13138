/* Arithmetic that the CPU and the CUDA kernels share: one number at a time, in the common part of C and C++.
 *
 * Both compilers leave products and sums apart (-ffp-contract=off, -fmad=false) and every operation here is correctly
 * rounded, so the CPU and a GPU get the same bits from the same arguments.
 */
#ifndef RLHF_SCALAR_H
#define RLHF_SCALAR_H

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define SHARED static __host__ __device__ __forceinline__
#else
#define SHARED static inline __attribute__((always_inline, unused))
#endif

#define LN_2 0x1.62e42fefa39efp-1
#define LOG2_E 0x1.71547652b82fep+0
#define CANONICAL_NAN __builtin_nanf("")
/* Below this exponent a power of 2 counts as 0: its float32 would be subnormal. */
#define LOWEST_EXPONENT -127.0f

SHARED double double_from_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
SHARED uint64_t bits_from_double(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* log2 in float64 of a finite x >= 2^-1022, within about 2^-50 of max(1, log2 x), and exactly 0 at 1.
 * x = 2^k m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172. */
SHARED double double_log2(double x) {
    uint64_t bits = bits_from_double(x);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    double m = double_from_bits((bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
    const int above = m > 0x1.6a09e667f3bcdp+0; /* no branch: it goes either way as often */
    m = above ? 0.5 * m : m;
    k += above;
    double s = (m - 1.0) / (m + 1.0);
    double square = s * s;
    const double reciprocal[11] = {1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0, 1.0 / 11.0,
                                   1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0};
    double series = 0.0;
    for (int n = 10; n >= 0; n--) series = series * square + reciprocal[n];
    return (double)k + 2.0 * s * series * LOG2_E;
}

/* What t = (x - largest) * scale is a power of 2 of: exp((x - largest) / temperature) = 2^t. Never 0, which would make NaN
 * of -inf: no finite x notices. */
SHARED float scale_from(double inverse_temperature) {
    const float scale = (float)(LOG2_E * inverse_temperature);
    return scale > 0.0f ? scale : 0x1p-149f;
}

/* What the exponentials of a row are relative to. Before the first number above -inf any reference will do: -inf adds 0,
 * and NaN adds NaN. */
SHARED float reference_of(float largest) { return largest == -__builtin_inff() ? 0.0f : largest; }

/* NaN in a row reaches its sum; +inf, or nothing above -inf, shows in the maximum. */
SHARED int sums_are_of_a_distribution(float largest, double sum) {
    return largest > -__builtin_inff() && largest < __builtin_inff() && sum == sum;
}

/* ln softmax(logits / temperature) of one logit, given its row's maximum and log2 of its sum. */
SHARED float logp_of(float logit, float largest, double log2_sum, double inverse_temperature) {
    return (float)(((double)logit - (double)largest) * inverse_temperature - log2_sum * LN_2);
}

/* H = ln S - Σ p (x - largest) / temperature, with S = Σ 2^t and weighted = Σ t 2^t. */
SHARED float entropy_of(double log2_sum, double sum, double weighted) {
    return (float)((log2_sum - weighted / sum) * LN_2);
}

/* p = softmax(logits / temperature), g = grad_logp, h = grad_entropy, H = entropy:
 *     d logp / d x_j = ([j = label] - p_j) / temperature,  d H / d x_j = -p_j (ln p_j + H) / temperature,
 * so the gradient is -p_j (at_zero + slope t_j), t_j = log2 p_j, plus at_label at the label. */
typedef struct {
    float at_zero, slope, at_label;
} gradient_line;

SHARED gradient_line gradient_line_of(float grad_logp, float grad_entropy, float entropy, double inverse_temperature) {
    gradient_line line;
    line.at_zero = (float)(((double)grad_logp + (double)grad_entropy * (double)entropy) * inverse_temperature);
    line.slope = (float)((double)grad_entropy * inverse_temperature * LN_2);
    line.at_label = (float)((double)grad_logp * inverse_temperature);
    return line;
}

/* (x - mean) / sqrt(variance + epsilon), with the mean added back where it is to be kept. */
SHARED double whitened_of(double x, double mean, double scale, double shift) { return (x - mean) * scale + shift; }

#endif
