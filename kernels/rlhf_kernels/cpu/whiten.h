/* Mean, variance and scaling over the masked elements of a chunk, in eight float64 lanes with a fixed tree. */
#ifndef RLHF_WHITEN_H
#define RLHF_WHITEN_H

#include "../shared/scalar.h"
#include "lanes.h"

#define WIDE 8 /* float64 lanes */

/* Outside of the mask 0 counts, which changes no sum: a sum that began at +0 is never -0. */
INLINE wide wide_inside(const uint8_t *mask, wide x) { return wide_choose(wide_load_mask(mask), x, wide_set(0.0)); }

/* How many of eight bytes are not 0. */
INLINE int64_t count_inside(const uint8_t *mask) {
    uint64_t bytes;
    memcpy(&bytes, mask, sizeof bytes);
    const uint64_t low = 0x7F7F7F7F7F7F7F7Full, ones = 0x0101010101010101ull;
    const uint64_t inside = (((bytes & low) + low) | bytes) >> 7 & ones;
    return (int64_t)(inside * ones >> 56);
}

INLINE wide whitened_wide(wide x, const uint8_t *mask, wide mean, wide scale, wide shift) {
    return wide_inside(mask, wide_add(wide_mul(wide_sub(x, mean), scale), shift)); /* whitened_of, of eight */
}

/* Fewer than WIDE elements that are left at the end, followed by some outside of the mask. */
#define WHITEN_REST(real)                                          \
    typedef struct {                                               \
        real x[WIDE];                                              \
        uint8_t mask[WIDE];                                        \
    } rest_of_##real;                                              \
    INLINE rest_of_##real rest_##real(const real *x, const uint8_t *mask, int64_t n) { \
        rest_of_##real rest = {{0}, {0}};                          \
        memcpy(rest.x, x, (size_t)n * sizeof(real));               \
        memcpy(rest.mask, mask, (size_t)n);                        \
        return rest;                                               \
    }

#define WHITEN_CHUNK(real, load, store)                                                                                \
    WHITEN_REST(real)                                                                                                  \
    static void sum_##real(const real *x, const uint8_t *mask, int64_t n, int64_t *count, double *sum) {               \
        const int64_t whole = n / WIDE * WIDE;                                                                         \
        const rest_of_##real rest = rest_##real(x + whole, mask + whole, n - whole);                                   \
        wide total = wide_set(0.0);                                                                                    \
        int64_t inside = 0;                                                                                            \
        for (int64_t i = 0; i < whole; i += WIDE) {                                                                    \
            total = wide_add(total, wide_inside(mask + i, load(x + i)));                                               \
            inside += count_inside(mask + i);                                                                          \
        }                                                                                                              \
        *sum = wide_sum(wide_add(total, wide_inside(rest.mask, load(rest.x))));                                        \
        *count = inside + count_inside(rest.mask);                                                                     \
    }                                                                                                                  \
    INLINE wide add_squares_##real(wide total, const real *x, const uint8_t *mask, wide mean) {                        \
        const wide deviation = wide_inside(mask, wide_sub(load(x), mean));                                             \
        return wide_add(total, wide_mul(deviation, deviation));                                                        \
    }                                                                                                                  \
    static double squares_##real(const real *x, const uint8_t *mask, int64_t n, double mean) {                         \
        const int64_t whole = n / WIDE * WIDE;                                                                         \
        const rest_of_##real rest = rest_##real(x + whole, mask + whole, n - whole);                                   \
        wide total = wide_set(0.0);                                                                                    \
        for (int64_t i = 0; i < whole; i += WIDE) total = add_squares_##real(total, x + i, mask + i, wide_set(mean));  \
        return wide_sum(add_squares_##real(total, rest.x, rest.mask, wide_set(mean)));                                 \
    }                                                                                                                  \
    static void scale_##real(const real *x, const uint8_t *mask, int64_t n, double mean, double scale, double shift,   \
                             real *out) {                                                                              \
        const wide m = wide_set(mean), by = wide_set(scale), back = wide_set(shift);                                   \
        const int64_t whole = n / WIDE * WIDE;                                                                         \
        for (int64_t i = 0; i < whole; i += WIDE) store(out + i, whitened_wide(load(x + i), mask + i, m, by, back));   \
        const rest_of_##real rest = rest_##real(x + whole, mask + whole, n - whole);                                   \
        real last[WIDE];                                                                                               \
        store(last, whitened_wide(load(rest.x), rest.mask, m, by, back));                                              \
        memcpy(out + whole, last, (size_t)(n - whole) * sizeof(real));                                                 \
    }

WHITEN_CHUNK(float, wide_load_float, wide_store_float)
WHITEN_CHUNK(double, wide_load, wide_store)

#endif
