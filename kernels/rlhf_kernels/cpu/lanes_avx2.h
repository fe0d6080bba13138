/* Sixteen lanes in two 256-bit registers: lanes 0-7 and 8-15. See lanes.h. */
#include <immintrin.h>

typedef struct {
    __m256 low, high;
} lanes;

INLINE lanes lanes_pair(__m256 low, __m256 high) { return (lanes){low, high}; }
INLINE lanes lanes_set(float x) { return lanes_pair(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE lanes lanes_load(const float *p) { return lanes_pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void lanes_store(float *p, lanes x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
INLINE void lanes_stream(float *p, lanes x) {
    _mm256_stream_ps(p, x.low);
    _mm256_stream_ps(p + 8, x.high);
}
INLINE lanes lanes_add(lanes a, lanes b) {
    return lanes_pair(_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high));
}
INLINE lanes lanes_sub(lanes a, lanes b) {
    return lanes_pair(_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high));
}
INLINE lanes lanes_mul(lanes a, lanes b) {
    return lanes_pair(_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}
INLINE lanes lanes_div(lanes a, lanes b) {
    return lanes_pair(_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high));
}
INLINE lanes lanes_fma(lanes a, lanes b, lanes c) {
    return lanes_pair(_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high));
}
INLINE lanes lanes_max(lanes a, lanes b) {
    return lanes_pair(_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high));
}

/* Lane i meets lane i + 8, then i + 4, i + 2, i + 1. */
INLINE float lanes_largest(lanes x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE __m256 half_load_quarters(const float *p, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
/* Four floats from each of p, p + stride, p + 2 stride and p + 3 stride: one a quarter. */
INLINE lanes lanes_load_quarters(const float *p, int64_t stride) {
    return lanes_pair(half_load_quarters(p, stride), half_load_quarters(p + 2 * stride, stride));
}
/* In each quarter: x[j][i] becomes what x[i][j] was. */
INLINE void half_turn_quarters(__m256 *a, __m256 *b, __m256 *c, __m256 *d) {
    const __m256 low_ab = _mm256_unpacklo_ps(*a, *b), high_ab = _mm256_unpackhi_ps(*a, *b);
    const __m256 low_cd = _mm256_unpacklo_ps(*c, *d), high_cd = _mm256_unpackhi_ps(*c, *d);
    *a = _mm256_shuffle_ps(low_ab, low_cd, 0x44);
    *b = _mm256_shuffle_ps(low_ab, low_cd, 0xEE);
    *c = _mm256_shuffle_ps(high_ab, high_cd, 0x44);
    *d = _mm256_shuffle_ps(high_ab, high_cd, 0xEE);
}
INLINE void lanes_turn_quarters(lanes x[4]) {
    half_turn_quarters(&x[0].low, &x[1].low, &x[2].low, &x[3].low);
    half_turn_quarters(&x[0].high, &x[1].high, &x[2].high, &x[3].high);
}

INLINE __m256 half_where(const uint8_t *mask, __m256 x) {
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)mask));
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bytes, _mm256_setzero_si256())));
}
/* x where a byte of the mask is not 0, and 0 elsewhere. */
INLINE lanes lanes_where(const uint8_t *mask, lanes x) {
    return lanes_pair(half_where(mask, x.low), half_where(mask + 8, x.high));
}

INLINE __m256 half_exponent_from_low_bits(__m256 x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}
/* The low nine bits of each lane moved up to sign and exponent. */
INLINE lanes lanes_exponent_from_low_bits(lanes x) {
    return lanes_pair(half_exponent_from_low_bits(x.low), half_exponent_from_low_bits(x.high));
}

INLINE __m256 half_from_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
INLINE lanes lanes_from_bf16(__m256i x) {
    return lanes_pair(half_from_bf16(_mm256_castsi256_si128(x)), half_from_bf16(_mm256_extracti128_si256(x, 1)));
}
INLINE lanes lanes_from_f16(__m256i x) {
    return lanes_pair(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
INLINE lanes lanes_load_bf16(const uint16_t *p) { return lanes_from_bf16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE lanes lanes_load_f16(const uint16_t *p) { return lanes_from_f16(_mm256_loadu_si256((const __m256i *)p)); }

/* The first `count` < 16 elements without a byte behind them, -inf in the other lanes. */
#define LANES_LOAD_FIRST
/* All bits set in the lanes of eight before `count`. */
INLINE __m256i half_before(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE __m256 half_first(__m256 x, int64_t count) {
    return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), x, _mm256_castsi256_ps(half_before(count)));
}
INLINE lanes lanes_first(lanes x, int64_t count) {
    return lanes_pair(half_first(x.low, count), half_first(x.high, count - 8));
}
INLINE lanes lanes_load_first(const float *p, int64_t count) {
    const __m256 low = _mm256_maskload_ps(p, half_before(count));
    return lanes_first(lanes_pair(low, _mm256_maskload_ps(p + 8, half_before(count - 8))), count);
}
/* Pairs first, as there are no masks for 16 bits, then the odd one. */
INLINE __m256i first_halves(const uint16_t *p, int64_t count) {
    const __m256i x = _mm256_maskload_epi32((const int *)p, half_before(count / 2));
    const __m256i last = _mm256_set1_epi32(count % 2 ? p[count - 1] : 0);
    return _mm256_blendv_epi8(last, x, half_before(count / 2));
}
INLINE lanes lanes_load_first_bf16(const uint16_t *p, int64_t count) {
    return lanes_first(lanes_from_bf16(first_halves(p, count)), count);
}
INLINE lanes lanes_load_first_f16(const uint16_t *p, int64_t count) {
    return lanes_first(lanes_from_f16(first_halves(p, count)), count);
}

INLINE __m256i half_round_to_bf16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}
/* To nearest, ties to even. A NaN must not be rounded up into infinity, but the kernels write NaN rows themselves. */
INLINE void lanes_store_bf16(uint16_t *p, lanes x) {
    /* packus works within 128-bit halves: put the four quarters back in order. */
    __m256i packed = _mm256_packus_epi32(half_round_to_bf16(x.low), half_round_to_bf16(x.high));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
INLINE void lanes_store_f16(uint16_t *p, lanes x) {
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.low, nearest));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.high, nearest));
}

/* Eight float64 lanes, and a choice for each. */
typedef struct {
    __m256d low, high;
} wide;
typedef wide wide_mask;

INLINE wide wide_pair(__m256d low, __m256d high) { return (wide){low, high}; }
INLINE wide wide_set(double x) { return wide_pair(_mm256_set1_pd(x), _mm256_set1_pd(x)); }
INLINE wide wide_load(const double *p) { return wide_pair(_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)); }
INLINE wide wide_load_float(const float *p) {
    return wide_pair(_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4)));
}
INLINE void wide_store(double *p, wide x) {
    _mm256_storeu_pd(p, x.low);
    _mm256_storeu_pd(p + 4, x.high);
}
INLINE void wide_store_float(float *p, wide x) {
    _mm_storeu_ps(p, _mm256_cvtpd_ps(x.low));
    _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(x.high));
}
INLINE wide half_to_wide(__m256 x) {
    return wide_pair(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
INLINE __m256 half_from_wide(wide x) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.low)), _mm256_cvtpd_ps(x.high), 1);
}
INLINE wide wide_from_low(lanes x) { return half_to_wide(x.low); }
INLINE wide wide_from_high(lanes x) { return half_to_wide(x.high); }
INLINE lanes lanes_from_wide(wide low, wide high) { return lanes_pair(half_from_wide(low), half_from_wide(high)); }
INLINE wide wide_add(wide a, wide b) { return wide_pair(_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)); }
INLINE wide wide_sub(wide a, wide b) { return wide_pair(_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)); }
INLINE wide wide_mul(wide a, wide b) { return wide_pair(_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)); }
INLINE __m256d half_load_mask(const uint8_t *p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(wide, _mm256_setzero_si256()));
}
INLINE wide_mask wide_load_mask(const uint8_t *p) { return wide_pair(half_load_mask(p), half_load_mask(p + 4)); }
INLINE wide wide_choose(wide_mask mask, wide a, wide b) {
    return wide_pair(_mm256_blendv_pd(b.low, a.low, mask.low), _mm256_blendv_pd(b.high, a.high, mask.high));
}
/* Fixed tree: lane i meets lane i + 4, then i + 2, i + 1. */
INLINE double wide_sum(wide x) {
    const __m256d four = _mm256_add_pd(x.low, x.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
