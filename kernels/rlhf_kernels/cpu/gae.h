/* Generalised advantage estimation: Schulman et al. 2016, arXiv 1506.02438, equations 12 and 16.
 *
 * The recursion runs in float64 for both element types, in the same order for every row, so a row does not depend on the
 * rows beside it. The return is the sum of the rounded advantage and the value: returns == advantages + values holds bit
 * for bit.
 *
 * In float32 sixteen rows go side by side, one a lane, because the recursion of one row waits for itself. They are turned
 * over, STRIP tokens at a time, through buffers in which a quarter of a vector has four tokens of one row. Outside of the
 * buffers memory is passed along the rows, at most four at once: rows whose length is a multiple of 4096 bytes share one
 * set of the first-level cache, which does not hold a line of each of sixteen.
 */
#ifndef RLHF_GAE_H
#define RLHF_GAE_H

#include "transpose.h"

#define ROWS 16
#define STRIP 128
#define TILE 16 /* tokens whose mask is looked at together */

/* Quarter q of vector [j][i] has the tokens 4 j to 4 j + 3 of row i + 4 q. */
typedef lanes quarters[STRIP / 4][4];

typedef struct {
    quarters reward, value, gamma, lam;
} gae_buffers;

/* Sixteen rows by n tokens, a multiple of TILE. gamma and lam count where gammas and lams are NULL. */
typedef struct {
    const float *rewards, *values, *gammas, *lams;
    const uint8_t *mask;
    float *advantages, *returns;
    int64_t n, stride;
    double gamma, lam;
    int stream;
    int64_t ahead; /* from these tokens to those of the strip that comes next; 0 = there is none */
} gae_strip;

/* Rows 0 to 7, and rows 8 to 15. */
typedef struct {
    wide half[2];
} wide_rows;

/* What a token carries back to the one before it. */
typedef struct {
    wide_rows value, advantage;
} gae_carry;

INLINE wide_rows widen(lanes x) { return (wide_rows){{wide_from_low(x), wide_from_high(x)}}; }
INLINE wide_rows wide_same(double x) { return (wide_rows){{wide_set(x), wide_set(x)}}; }

/* One token of sixteen rows. `mask` is NULL where all are inside. */
INLINE lanes gae_token(wide_rows reward, wide_rows value, wide_rows gamma, wide_rows lam, const uint8_t *mask,
                       gae_carry *after) {
    wide_rows advantage;
    for (int h = 0; h < 2; h++) {
        const wide next = wide_mul(gamma.half[h], after->value.half[h]);
        const wide delta = wide_sub(wide_add(reward.half[h], next), value.half[h]);
        const wide decay = wide_mul(gamma.half[h], lam.half[h]);
        advantage.half[h] = wide_add(delta, wide_mul(decay, after->advantage.half[h]));
        if (mask) {
            const wide_mask inside = wide_load_mask(mask + 8 * h);
            after->value.half[h] = wide_choose(inside, value.half[h], after->value.half[h]);
            after->advantage.half[h] = wide_choose(inside, advantage.half[h], after->advantage.half[h]);
        }
    }
    if (!mask) *after = (gae_carry){value, advantage};
    const lanes rounded = lanes_from_wide(advantage.half[0], advantage.half[1]);
    return mask ? lanes_where(mask, rounded) : rounded;
}

INLINE void read_quarters(const float *from, const gae_strip *s, quarters to) {
    for (int i = 0; i < 4; i++)
        for (int64_t j = 0; j < s->n / 4; j++)
            lanes_store((float *)&to[j][i], lanes_load_quarters(from + i * s->stride + 4 * j, 4 * s->stride));
}

/* Four tokens of sixteen rows, a vector each. Whole vectors go to and from memory: what a compiler copies in pieces of
 * sixteen bytes has to reach the cache before a wider load can have it. */
INLINE void load_four_tokens(const lanes from[4], lanes to[4]) {
    for (int i = 0; i < 4; i++) to[i] = lanes_load((const float *)&from[i]);
    lanes_turn_quarters(to);
}
INLINE void store_four_tokens(lanes from[4], lanes to[4]) {
    lanes_turn_quarters(from);
    for (int i = 0; i < 4; i++) lanes_store((float *)&to[i], from[i]);
}

/* TILE tokens from vector `first` of the buffers on; the advantages take the places of the rewards. */
INLINE void gae_tile(gae_buffers *b, int64_t first, const uint8_t (*mask)[ROWS], int per_token_gamma, int per_token_lam,
                     double gamma, double lam, gae_carry *after) {
    for (int j = TILE / 4 - 1; j >= 0; j--) {
        lanes reward[4], value[4], gammas[4], lams[4];
        load_four_tokens(b->reward[first + j], reward);
        load_four_tokens(b->value[first + j], value);
        if (per_token_gamma) load_four_tokens(b->gamma[first + j], gammas);
        if (per_token_lam) load_four_tokens(b->lam[first + j], lams);
        for (int t = 3; t >= 0; t--) {
            const wide_rows g = per_token_gamma ? widen(gammas[t]) : wide_same(gamma);
            const wide_rows l = per_token_lam ? widen(lams[t]) : wide_same(lam);
            reward[t] = gae_token(widen(reward[t]), widen(value[t]), g, l, mask ? mask[4 * j + t] : 0, after);
        }
        store_four_tokens(reward, b->reward[first + j]);
    }
}

/* Whether a square of the mask is all ones. */
INLINE int all_inside(const uint8_t *mask, int64_t stride) {
    uint64_t both = ~0ull;
    for (int i = 0; i < ROWS; i++) {
        uint64_t bytes[TILE / 8];
        memcpy(bytes, mask + i * stride, sizeof bytes);
        both &= bytes[0] & bytes[1];
    }
    return (both & 0x0101010101010101ull) == 0x0101010101010101ull;
}

/* A tile's share of the strip that comes next: nothing waits while memory is far away. */
INLINE void fetch_ahead(const gae_strip *s, int64_t t) {
    if (!s->ahead) return;
    for (int64_t i = t * ROWS / STRIP; i < (t + TILE) * ROWS / STRIP; i++) {
        const int64_t at = i * s->stride + s->ahead;
        for (int64_t u = 0; u < STRIP; u += LANES) {
            __builtin_prefetch(s->rewards + at + u, 0, 2);
            __builtin_prefetch(s->values + at + u, 0, 2);
        }
        for (int64_t u = 0; u < STRIP; u += 64) __builtin_prefetch(s->mask + at + u, 0, 2);
    }
}

INLINE void write_rows(const gae_strip *s, const quarters advantage) {
    for (int i = 0; i < ROWS; i++)
        for (int64_t t = 0; t < s->n; t += LANES) {
            const int64_t at = i * s->stride + t;
            const float *first_quarter = (const float *)&advantage[t / 4][i % 4] + i / 4 * 4;
            const lanes a = lanes_load_quarters(first_quarter, 4 * LANES);
            const lanes r = lanes_where(s->mask + at, lanes_add(a, lanes_load(s->values + at)));
            if (s->stream) {
                lanes_stream(s->advantages + at, a);
                lanes_stream(s->returns + at, r);
            } else {
                lanes_store(s->advantages + at, a);
                lanes_store(s->returns + at, r);
            }
        }
}

static void gae_of_strip(const gae_strip *s, gae_carry *after) {
    gae_buffers b;
    read_quarters(s->rewards, s, b.reward);
    read_quarters(s->values, s, b.value);
    if (s->gammas) read_quarters(s->gammas, s, b.gamma);
    if (s->lams) read_quarters(s->lams, s, b.lam);
    for (int64_t t = s->n - TILE; t >= 0; t -= TILE) {
        uint8_t mask[TILE][ROWS];
        fetch_ahead(s, t);
        if (!s->gammas && !s->lams && all_inside(s->mask + t, s->stride)) {
            gae_tile(&b, t / 4, 0, 0, 0, s->gamma, s->lam, after);
            continue;
        }
        turn_bytes(s->mask + t, s->stride, mask);
        if (s->gammas && s->lams) gae_tile(&b, t / 4, mask, 1, 1, 0.0, 0.0, after);
        else if (s->gammas) gae_tile(&b, t / 4, mask, 1, 0, 0.0, s->lam, after);
        else if (s->lams) gae_tile(&b, t / 4, mask, 0, 1, s->gamma, 0.0, after);
        else gae_tile(&b, t / 4, mask, 0, 0, s->gamma, s->lam, after);
    }
    write_rows(s, b.reward);
}

/* A strip where rows or tokens are missing: they are zeros outside of the mask. */
typedef struct {
    float rewards[ROWS][STRIP], values[ROWS][STRIP], gammas[ROWS][STRIP], lams[ROWS][STRIP];
    float advantages[ROWS][STRIP], returns[ROWS][STRIP];
    uint8_t mask[ROWS][STRIP];
} padded_strip;

INLINE void pad(const void *from, int64_t stride, int64_t rows, int64_t n, int64_t padded, int64_t bytes, void *to) {
    for (int64_t i = 0; i < ROWS; i++) {
        const int64_t there = i < rows ? n : 0;
        char *row = (char *)to + i * STRIP * bytes;
        memcpy(row, (const char *)from + i * stride * bytes, (size_t)(there * bytes));
        memset(row + there * bytes, 0, (size_t)((padded - there) * bytes));
    }
}

NOT_INLINE void gae_of_part(const gae_strip *s, int64_t rows, gae_carry *after) {
    padded_strip p;
    const int64_t n = (s->n + TILE - 1) / TILE * TILE;
    const float *from[4] = {s->rewards, s->values, s->gammas, s->lams};
    float *to[4] = {p.rewards[0], p.values[0], p.gammas[0], p.lams[0]};
    for (int k = 0; k < 4; k++)
        if (from[k]) pad(from[k], s->stride, rows, s->n, n, sizeof(float), to[k]);
    pad(s->mask, s->stride, rows, s->n, n, 1, p.mask);
    gae_strip whole = {to[0], to[1], s->gammas ? to[2] : 0, s->lams ? to[3] : 0, p.mask[0], p.advantages[0],
                       p.returns[0], n, STRIP, s->gamma, s->lam, 0, 0};
    gae_of_strip(&whole, after);
    for (int64_t i = 0; i < rows; i++) {
        memcpy(s->advantages + i * s->stride, p.advantages[i], (size_t)s->n * sizeof(float));
        memcpy(s->returns + i * s->stride, p.returns[i], (size_t)s->n * sizeof(float));
    }
}

static void gae_float(const float *rewards, const float *values, const uint8_t *mask, int64_t rows, int64_t tokens,
                      const float *bootstrap, const float *gammas, const float *lams, double gamma, double lam,
                      int stream, float *advantages, float *returns) {
    float first_value[ROWS] = {0};
    if (bootstrap) memcpy(first_value, bootstrap, (size_t)rows * sizeof(float));
    gae_carry after = {widen(lanes_load(first_value)), wide_same(0.0)};
    for (int64_t start = (tokens - 1) / STRIP * STRIP; start >= 0; start -= STRIP) {
        const int64_t n = tokens - start < STRIP ? tokens - start : STRIP;
        const int64_t ahead = start > 0 ? -STRIP : ROWS * tokens + (tokens - 1) / STRIP * STRIP;
        const gae_strip s = {rewards + start, values + start, gammas ? gammas + start : 0, lams ? lams + start : 0,
                             mask + start, advantages + start, returns + start, n, tokens, gamma, lam, stream, ahead};
        if (rows == ROWS && n % TILE == 0) gae_of_strip(&s, &after);
        else gae_of_part(&s, rows, &after);
    }
}

static void gae_double(const double *rewards, const double *values, const uint8_t *mask, int64_t rows, int64_t tokens,
                       const double *bootstrap, const double *gammas, const double *lams, double gamma, double lam,
                       int stream, double *advantages, double *returns) {
    (void)stream;
    for (int64_t row = 0; row < rows; row++) {
        double next_value = bootstrap ? bootstrap[row] : 0.0, next_advantage = 0.0;
        for (int64_t i = (row + 1) * tokens - 1; i >= row * tokens; i--) {
            advantages[i] = returns[i] = 0.0;
            if (!mask[i]) continue;
            const double g = gammas ? gammas[i] : gamma, l = lams ? lams[i] : lam;
            const double delta = rewards[i] + g * next_value - values[i];
            advantages[i] = next_advantage = delta + g * l * next_advantage;
            next_value = values[i];
            returns[i] = advantages[i] + values[i];
        }
    }
}

#endif
