/* Sixteen lanes in four 128-bit vectors of the compiler's own vector extension: SSE2, and any other processor.
 *
 * Where the processor has no fused multiply-add, it is computed through float64. See lanes.h.
 */
typedef float quarter __attribute__((vector_size(16)));
typedef int32_t quarter_bits __attribute__((vector_size(16)));
typedef float float_pair __attribute__((vector_size(8)));
typedef double double_pair __attribute__((vector_size(16)));
typedef int64_t double_bits __attribute__((vector_size(16)));

typedef struct {
    quarter q[4];
} lanes;

#define EACH_QUARTER(expression)                         \
    lanes result;                                        \
    for (int i = 0; i < 4; i++) result.q[i] = expression; \
    return result

INLINE quarter quarter_load(const float *p) {
    quarter x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE lanes lanes_set(float x) { EACH_QUARTER(((quarter){x, x, x, x})); }
INLINE lanes lanes_load(const float *p) { EACH_QUARTER(quarter_load(p + 4 * i)); }
INLINE void lanes_store(float *p, lanes x) { memcpy(p, &x, sizeof x); }
INLINE void lanes_stream(float *p, lanes x) { lanes_store(p, x); }
INLINE lanes lanes_add(lanes a, lanes b) { EACH_QUARTER(a.q[i] + b.q[i]); }
INLINE lanes lanes_sub(lanes a, lanes b) { EACH_QUARTER(a.q[i] - b.q[i]); }
INLINE lanes lanes_mul(lanes a, lanes b) { EACH_QUARTER(a.q[i] * b.q[i]); }
INLINE lanes lanes_div(lanes a, lanes b) { EACH_QUARTER(a.q[i] / b.q[i]); }

#if defined(__clang__)
#define SHUFFLE(a, b, mask_type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, mask_type, ...) __builtin_shuffle(a, b, (mask_type){__VA_ARGS__})
#endif

/* Four floats from each of p, p + stride, p + 2 stride and p + 3 stride: one a quarter. */
INLINE lanes lanes_load_quarters(const float *p, int64_t stride) { EACH_QUARTER(quarter_load(p + i * stride)); }
/* In each quarter: x[j][i] becomes what x[i][j] was. */
INLINE void lanes_turn_quarters(lanes x[4]) {
    for (int i = 0; i < 4; i++) {
        const quarter a = x[0].q[i], b = x[1].q[i], c = x[2].q[i], d = x[3].q[i];
        const quarter low_ab = SHUFFLE(a, b, quarter_bits, 0, 4, 1, 5), high_ab = SHUFFLE(a, b, quarter_bits, 2, 6, 3, 7);
        const quarter low_cd = SHUFFLE(c, d, quarter_bits, 0, 4, 1, 5), high_cd = SHUFFLE(c, d, quarter_bits, 2, 6, 3, 7);
        x[0].q[i] = SHUFFLE(low_ab, low_cd, quarter_bits, 0, 1, 4, 5);
        x[1].q[i] = SHUFFLE(low_ab, low_cd, quarter_bits, 2, 3, 6, 7);
        x[2].q[i] = SHUFFLE(high_ab, high_cd, quarter_bits, 0, 1, 4, 5);
        x[3].q[i] = SHUFFLE(high_ab, high_cd, quarter_bits, 2, 3, 6, 7);
    }
}

/* x where a byte of the mask is not 0, and 0 elsewhere. */
INLINE lanes lanes_where(const uint8_t *mask, lanes x) {
    EACH_QUARTER((quarter)((quarter_bits)x.q[i] & ~((quarter_bits){mask[4 * i], mask[4 * i + 1], mask[4 * i + 2],
                                                                  mask[4 * i + 3]} == 0)));
}

INLINE quarter quarter_max(quarter a, quarter b) {
    quarter_bits take_a = a > b;
    return (quarter)((take_a & (quarter_bits)a) | (~take_a & (quarter_bits)b));
}
INLINE lanes lanes_max(lanes a, lanes b) { EACH_QUARTER(quarter_max(a.q[i], b.q[i])); }

/* Lane i meets lane i + 8, then i + 4, i + 2, i + 1. */
INLINE float lanes_largest(lanes x) {
    const quarter four = quarter_max(quarter_max(x.q[0], x.q[2]), quarter_max(x.q[1], x.q[3]));
    const float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
    return a > b ? a : b;
}

/* The low nine bits of each lane moved up to sign and exponent. */
INLINE lanes lanes_exponent_from_low_bits(lanes x) {
    EACH_QUARTER((quarter)(quarter_bits)((quarter_bits)x.q[i] << 23));
}

#if defined(__FP_FAST_FMAF)
INLINE quarter quarter_fma(quarter a, quarter b, quarter c) {
    quarter r;
    for (int i = 0; i < 4; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
}
#else
/* The float64 product of two float32 numbers is exact, so only the addition rounds. It is rounded to odd: a sum that is
 * not exact takes the neighbour whose last bit is 1. The second rounding, to float32, then gives what one rounding would
 * (Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd"). */
INLINE double_pair pair_fma_to_odd(double_pair a, double_pair b, double_pair c) {
    double_pair product = a * b;
    double_pair sum = product + c;
    double_pair back = sum - product;
    double_pair error = (product - (sum - back)) + (c - back); /* exact: Knuth's two-sum */
    double_bits up = error > 0.0;
    double_bits down = error < 0.0; /* neither for NaN, so infinities stay */
    double_bits negative = sum < 0.0;
    double_bits bits = (double_bits)sum;
    double_bits even = (bits & 1) - 1;               /* all ones where the last bit is 0 */
    double_bits away_from_zero = (up & ~negative) | (down & negative);
    double_bits step = (away_from_zero & 1) | ((up | down) & ~away_from_zero);
    return (double_pair)(bits + (step & even));
}
NOT_INLINE quarter quarter_fma(quarter a, quarter b, quarter c) {
    quarter r;
    for (int i = 0; i < 4; i += 2) {
        double_pair sum = pair_fma_to_odd((double_pair){a[i], a[i + 1]}, (double_pair){b[i], b[i + 1]},
                                          (double_pair){c[i], c[i + 1]});
        r[i] = (float)sum[0];
        r[i + 1] = (float)sum[1];
    }
    return r;
}
#endif
INLINE lanes lanes_fma(lanes a, lanes b, lanes c) { EACH_QUARTER(quarter_fma(a.q[i], b.q[i], c.q[i])); }

INLINE float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE uint32_t bits_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return float_from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    if (magnitude >= 0x0400) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
    /* subnormal: an integer multiple of 2^-24, exact in float32 */
    return float_from_bits(sign | bits_from_float((float)magnitude * 0x1p-24f));
}

INLINE uint16_t f16_from_float(float x) {
    uint32_t bits = bits_from_float(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    if (magnitude >= 0x477FF000) return sign | 0x7C00; /* 65520 and above round to infinity */
    if (magnitude < 0x38800000) {                      /* below 2^-14: count multiples of 2^-24, rounded to even */
        float count = float_from_bits(magnitude) * 0x1p24f + 0x1.8p23f;
        return (uint16_t)(sign | (bits_from_float(count) & 0x7FF));
    }
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - (112u << 23)) >> 13));
}

NOT_INLINE lanes lanes_load_bf16(const uint16_t *p) {
    float wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = float_from_bits((uint32_t)p[i] << 16);
    return lanes_load(wide);
}
NOT_INLINE lanes lanes_load_f16(const uint16_t *p) {
    float wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = float_from_f16(p[i]);
    return lanes_load(wide);
}
/* To nearest, ties to even. A NaN must not be rounded up into infinity, but the kernels write NaN rows themselves. */
NOT_INLINE void lanes_store_bf16(uint16_t *p, lanes x) {
    float wide[LANES];
    lanes_store(wide, x);
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = bits_from_float(wide[i]);
        p[i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}
NOT_INLINE void lanes_store_f16(uint16_t *p, lanes x) {
    float wide[LANES];
    lanes_store(wide, x);
    for (int i = 0; i < LANES; i++) p[i] = f16_from_float(wide[i]);
}

/* Eight float64 lanes, and a choice for each. */
typedef struct {
    double_pair pair[4];
} wide;
typedef struct {
    double_bits pair[4];
} wide_mask;

#define EACH_PAIR(type, expression)                          \
    type result;                                             \
    for (int i = 0; i < 4; i++) result.pair[i] = expression; \
    return result

INLINE wide wide_set(double x) { EACH_PAIR(wide, ((double_pair){x, x})); }
INLINE wide wide_load(const double *p) { EACH_PAIR(wide, ((double_pair){p[2 * i], p[2 * i + 1]})); }
INLINE wide wide_load_float(const float *p) { EACH_PAIR(wide, ((double_pair){p[2 * i], p[2 * i + 1]})); }
INLINE void wide_store(double *p, wide x) { memcpy(p, &x, sizeof x); }
INLINE void wide_store_float(float *p, wide x) {
    for (int i = 0; i < 8; i++) p[i] = (float)x.pair[i / 2][i % 2];
}
INLINE wide wide_from_low(lanes x) { EACH_PAIR(wide, ((double_pair){x.q[i / 2][i % 2 * 2], x.q[i / 2][i % 2 * 2 + 1]})); }
INLINE wide wide_from_high(lanes x) {
    EACH_PAIR(wide, ((double_pair){x.q[2 + i / 2][i % 2 * 2], x.q[2 + i / 2][i % 2 * 2 + 1]}));
}
INLINE lanes lanes_from_wide(wide low, wide high) {
    lanes x;
    for (int i = 0; i < 8; i++) {
        x.q[i / 4][i % 4] = (float)low.pair[i / 2][i % 2];
        x.q[2 + i / 4][i % 4] = (float)high.pair[i / 2][i % 2];
    }
    return x;
}
INLINE wide wide_add(wide a, wide b) { EACH_PAIR(wide, a.pair[i] + b.pair[i]); }
INLINE wide wide_sub(wide a, wide b) { EACH_PAIR(wide, a.pair[i] - b.pair[i]); }
INLINE wide wide_mul(wide a, wide b) { EACH_PAIR(wide, a.pair[i] * b.pair[i]); }
INLINE wide_mask wide_load_mask(const uint8_t *p) {
    EACH_PAIR(wide_mask, ((double_bits){-(int64_t)(p[2 * i] != 0), -(int64_t)(p[2 * i + 1] != 0)}));
}
INLINE wide wide_choose(wide_mask mask, wide a, wide b) {
    EACH_PAIR(wide, (double_pair)((mask.pair[i] & (double_bits)a.pair[i]) | (~mask.pair[i] & (double_bits)b.pair[i])));
}
/* Fixed tree: lane i meets lane i + 4, then i + 2, i + 1. */
INLINE double wide_sum(wide x) {
    const double_pair two = (x.pair[0] + x.pair[2]) + (x.pair[1] + x.pair[3]);
    return two[0] + two[1];
}
