/* Sixteen float32 lanes: the one vector type of every CPU kernel.
 *
 * Each instruction set spells the same sixteen lanes in its own registers (one of 512 bits, two of 256, four of 128), and
 * every operation below is correctly rounded, so a kernel written with them gives the same bits on all of them. Which
 * spelling is used is decided by the compiler flags of the translation unit (see unit.c).
 *
 * max(a, b) is (a > b) ? a : b in each lane: b where either is NaN, as x86 does it.
 */
#ifndef RLHF_LANES_H
#define RLHF_LANES_H

#include <stdint.h>
#include <string.h>

#include "rows.h"

#define INLINE static inline __attribute__((always_inline, unused))
#define NOT_INLINE static __attribute__((noinline, unused)) /* long and seldom needed: copies would only cost space */

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

enum element_type { F32 = 0, BF16 = 1, F16 = 2 };

INLINE int element_bytes(enum element_type type) { return type == F32 ? 4 : 2; }

INLINE const void *element_at(const void *base, int64_t index, enum element_type type) {
    return (const char *)base + index * element_bytes(type);
}

/* `type` is a constant wherever this is inlined, so the branches vanish. */
INLINE lanes lanes_load_as(const void *from, enum element_type type) {
    if (type == F32) return lanes_load((const float *)from);
    if (type == BF16) return lanes_load_bf16((const uint16_t *)from);
    return lanes_load_f16((const uint16_t *)from);
}

INLINE void lanes_store_as(void *to, lanes x, enum element_type type) {
    if (type == F32) lanes_store((float *)to, x);
    else if (type == BF16) lanes_store_bf16((uint16_t *)to, x);
    else lanes_store_f16((uint16_t *)to, x);
}

#if !defined(LANES_LOAD_FIRST)
NOT_INLINE lanes lanes_load_first(const float *from, int64_t count) {
    float padded[LANES];
    for (int i = 0; i < LANES; i++) padded[i] = -__builtin_inff();
    memcpy(padded, from, (size_t)count * sizeof(float));
    return lanes_load(padded);
}
INLINE void pad_halves(const uint16_t *from, int64_t count, uint16_t minus_infinity, uint16_t padded[LANES]) {
    for (int i = 0; i < LANES; i++) padded[i] = minus_infinity;
    memcpy(padded, from, (size_t)count * sizeof(uint16_t));
}
NOT_INLINE lanes lanes_load_first_bf16(const uint16_t *from, int64_t count) {
    uint16_t padded[LANES];
    pad_halves(from, count, 0xFF80, padded);
    return lanes_load_bf16(padded);
}
NOT_INLINE lanes lanes_load_first_f16(const uint16_t *from, int64_t count) {
    uint16_t padded[LANES];
    pad_halves(from, count, 0xFC00, padded);
    return lanes_load_f16(padded);
}
#endif

/* The first `count` < 16 elements, the other lanes hold -inf: the neutral element of a maximum and of a sum of
 * exponentials. */
INLINE lanes lanes_load_some(const void *from, int64_t count, enum element_type type) {
    if (type == F32) return lanes_load_first((const float *)from, count);
    if (type == BF16) return lanes_load_first_bf16((const uint16_t *)from, count);
    return lanes_load_first_f16((const uint16_t *)from, count);
}

INLINE float element_load(const void *from, enum element_type type) {
    if (type == F32) {
        float x;
        memcpy(&x, from, sizeof x);
        return x;
    }
    float widened[LANES];
    lanes_store(widened, lanes_load_some(from, 1, type));
    return widened[0];
}

/* Fixed tree: lane i meets lane i + 8, then i + 4, i + 2, i + 1; float64 from the first step on. */
INLINE double lanes_sum(lanes x) { return wide_sum(wide_add(wide_from_low(x), wide_from_high(x))); }

#endif
