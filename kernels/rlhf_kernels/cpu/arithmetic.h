/* Exponential and logarithm in operations that every processor rounds alike: the C library's differ between processors.
 *
 * Everything is in base 2: 2^t for probabilities, log2 for their sums.
 */
#ifndef RLHF_ARITHMETIC_H
#define RLHF_ARITHMETIC_H

#include "../shared/scalar.h"
#include "lanes.h"

/* t, but at least -127, where lanes_exp2 gives exactly 0. NaN stays NaN. */
INLINE lanes lanes_clamp_exponent(lanes t) { return lanes_max(lanes_set(LOWEST_EXPONENT), t); }

/* 2^t for -127 <= t <= 0 (a little above 0 is fine), within 1.4 units of 2^-24; exactly 1 at 0 and exactly 0 at -127, so
 * no subnormal number ever appears. t = k + f with k an integer and |f| <= 1/2; the polynomial of degree 6 is the minimax
 * fit of 2^f in relative error (2e-9 before its coefficients are rounded), with constant term 1. */
INLINE lanes lanes_exp2(lanes t) {
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, with the exponent's bias added on the way. */
    const lanes shift = lanes_set(0x1.8p23f + 127.0f);
    lanes shifted = lanes_add(t, shift);
    lanes f = lanes_sub(t, lanes_sub(shifted, shift));
    lanes p = lanes_set(0x1.41fbbcp-13f);
    p = lanes_fma(p, f, lanes_set(0x1.5f3e52p-10f));
    p = lanes_fma(p, f, lanes_set(0x1.3b2d4cp-7f));
    p = lanes_fma(p, f, lanes_set(0x1.c6aee8p-5f));
    p = lanes_fma(p, f, lanes_set(0x1.ebfbdcp-3f));
    p = lanes_fma(p, f, lanes_set(0x1.62e430p-1f));
    p = lanes_fma(p, f, lanes_set(1.0f));
    return lanes_mul(p, lanes_exponent_from_low_bits(shifted));
}

/* 2^t in float64 for t <= 0, 0 below -1000. Taylor's series of e^y for |y| <= ln2/2, to 2^-52. */
INLINE double double_exp2(double t) {
    if (!(t > -1000.0)) return t == t ? 0.0 : t;
    double k = (t + 0x1.8p52) - 0x1.8p52;
    double y = (t - k) * LN_2;
    double p = 1.0;
    for (int n = 14; n > 0; n--) p = 1.0 + p * y / n;
    return p * double_from_bits((uint64_t)((int64_t)k + 1023) << 52);
}

#endif
