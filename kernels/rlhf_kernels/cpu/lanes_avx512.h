/* Sixteen lanes in one 512-bit register. See lanes.h. */
#include <immintrin.h>

typedef __m512 lanes;

INLINE lanes lanes_set(float x) { return _mm512_set1_ps(x); }
INLINE lanes lanes_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void lanes_store(float *p, lanes x) { _mm512_storeu_ps(p, x); }
INLINE void lanes_stream(float *p, lanes x) { _mm512_stream_ps(p, x); }
INLINE lanes lanes_add(lanes a, lanes b) { return _mm512_add_ps(a, b); }
INLINE lanes lanes_sub(lanes a, lanes b) { return _mm512_sub_ps(a, b); }
INLINE lanes lanes_mul(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
INLINE lanes lanes_div(lanes a, lanes b) { return _mm512_div_ps(a, b); }
INLINE lanes lanes_fma(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE lanes lanes_max(lanes a, lanes b) { return _mm512_max_ps(a, b); }

/* Lane i meets lane i + 8, then i + 4, i + 2, i + 1. */
INLINE float lanes_largest(lanes x) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* Four floats from each of p, p + stride, p + 2 stride and p + 3 stride: one a quarter. */
INLINE lanes lanes_load_quarters(const float *p, int64_t stride) {
    lanes x = _mm512_castps128_ps512(_mm_loadu_ps(p));
    x = _mm512_mask_broadcast_f32x4(x, 0x00F0, _mm_loadu_ps(p + stride));
    x = _mm512_mask_broadcast_f32x4(x, 0x0F00, _mm_loadu_ps(p + 2 * stride));
    return _mm512_mask_broadcast_f32x4(x, 0xF000, _mm_loadu_ps(p + 3 * stride));
}
/* In each quarter: x[j][i] becomes what x[i][j] was. */
INLINE void lanes_turn_quarters(lanes x[4]) {
    const lanes low_ab = _mm512_unpacklo_ps(x[0], x[1]), high_ab = _mm512_unpackhi_ps(x[0], x[1]);
    const lanes low_cd = _mm512_unpacklo_ps(x[2], x[3]), high_cd = _mm512_unpackhi_ps(x[2], x[3]);
    x[0] = _mm512_shuffle_ps(low_ab, low_cd, 0x44);
    x[1] = _mm512_shuffle_ps(low_ab, low_cd, 0xEE);
    x[2] = _mm512_shuffle_ps(high_ab, high_cd, 0x44);
    x[3] = _mm512_shuffle_ps(high_ab, high_cd, 0xEE);
}

/* x where a byte of the mask is not 0, and 0 elsewhere. */
INLINE lanes lanes_where(const uint8_t *mask, lanes x) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)mask));
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(bytes, bytes), x);
}

/* The low nine bits of each lane moved up to sign and exponent. */
INLINE lanes lanes_exponent_from_low_bits(lanes x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}

INLINE lanes lanes_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE lanes lanes_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* The first `count` < 16 elements without a byte behind them, -inf in the other lanes. */
#define LANES_LOAD_FIRST
INLINE lanes lanes_first(lanes x, int64_t count) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), (__mmask16)((1u << count) - 1), x);
}
INLINE lanes lanes_load_first(const float *p, int64_t count) {
    return lanes_first(_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p), count);
}
/* Pairs first, as there are no masks for 16 bits in AVX-512F, then the odd one. */
INLINE __m256i first_halves(const uint16_t *p, int64_t count) {
    const uint32_t pairs = 1u << (count / 2);
    __m512i x = _mm512_maskz_loadu_epi32((__mmask16)(pairs - 1), p);
    if (count % 2) x = _mm512_mask_set1_epi32(x, (__mmask16)pairs, p[count - 1]);
    return _mm512_castsi512_si256(x);
}
INLINE lanes lanes_load_first_bf16(const uint16_t *p, int64_t count) {
    __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(first_halves(p, count)), 16);
    return lanes_first(_mm512_castsi512_ps(wide), count);
}
INLINE lanes lanes_load_first_f16(const uint16_t *p, int64_t count) {
    return lanes_first(_mm512_cvtph_ps(first_halves(p, count)), count);
}

/* To nearest, ties to even. A NaN must not be rounded up into infinity, but the kernels write NaN rows themselves. */
INLINE void lanes_store_bf16(uint16_t *p, lanes x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
INLINE void lanes_store_f16(uint16_t *p, lanes x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Eight float64 lanes, and a choice for each. */
typedef __m512d wide;
typedef __mmask8 wide_mask;

INLINE wide wide_set(double x) { return _mm512_set1_pd(x); }
INLINE wide wide_load(const double *p) { return _mm512_loadu_pd(p); }
INLINE wide wide_load_float(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INLINE wide wide_from_low(lanes x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
INLINE wide wide_from_high(lanes x) {
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}
INLINE lanes lanes_from_wide(wide low, wide high) {
    const __m512d low_half = _mm512_castpd256_pd512(_mm256_castps_pd(_mm512_cvtpd_ps(low)));
    return _mm512_castpd_ps(_mm512_insertf64x4(low_half, _mm256_castps_pd(_mm512_cvtpd_ps(high)), 1));
}
INLINE void wide_store(double *p, wide x) { _mm512_storeu_pd(p, x); }
INLINE void wide_store_float(float *p, wide x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
INLINE wide wide_add(wide a, wide b) { return _mm512_add_pd(a, b); }
INLINE wide wide_sub(wide a, wide b) { return _mm512_sub_pd(a, b); }
INLINE wide wide_mul(wide a, wide b) { return _mm512_mul_pd(a, b); }
INLINE wide_mask wide_load_mask(const uint8_t *p) {
    __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
    return _mm512_test_epi64_mask(bytes, bytes);
}
INLINE wide wide_choose(wide_mask mask, wide a, wide b) { return _mm512_mask_blend_pd(mask, b, a); }
/* Fixed tree: lane i meets lane i + 4, then i + 2, i + 1. */
INLINE double wide_sum(wide x) {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
