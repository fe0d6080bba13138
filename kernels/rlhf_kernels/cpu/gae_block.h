/* The block of gae.h for one element type: REAL, NAMED(name) for its functions, WIDE_LOAD and WIDE_STORE. */

typedef struct {
    REAL reward[TILE][TILE], value[TILE][TILE], gamma[TILE][TILE], lam[TILE][TILE]; /* [token][row] */
    uint8_t mask[TILE][TILE];
} NAMED(tiles);

/* What a token carries back to the one before it. */
typedef struct {
    wide value, advantage;
} NAMED(carried);

/* One token of eight rows. The advantage takes the place of the reward, 0 that of a value outside. */
INLINE NAMED(carried) NAMED(token)(NAMED(tiles) *tile, int t, int row, wide gamma, wide lam, NAMED(carried) after) {
    const wide value = WIDE_LOAD(&tile->value[t][row]), reward = WIDE_LOAD(&tile->reward[t][row]);
    const wide_mask inside = wide_load_mask(&tile->mask[t][row]);
    const wide delta = wide_sub(wide_add(reward, wide_mul(gamma, after.value)), value);
    const wide advantage = wide_add(delta, wide_mul(wide_mul(gamma, lam), after.advantage));
    WIDE_STORE(&tile->reward[t][row], wide_choose(inside, advantage, wide_set(0.0)));
    WIDE_STORE(&tile->value[t][row], wide_choose(inside, value, wide_set(0.0)));
    after.value = wide_choose(inside, value, after.value);
    after.advantage = wide_choose(inside, advantage, after.advantage);
    return after;
}

/* Leaves the advantages in the place of the rewards and the returns in that of the values. */
INLINE void NAMED(gae_tile)(NAMED(tiles) *tile, int per_token_gamma, int per_token_lam, double gamma, double lam,
                            NAMED(carried) carry[HALVES]) {
    NAMED(carried) after[HALVES] = {carry[0], carry[1]};
    const wide all_gamma = wide_set(gamma), all_lam = wide_set(lam);
    for (int t = TILE - 1; t >= 0; t--)
        for (int half = 0; half < HALVES; half++) { /* side by side: each hides the other's latency */
            const int row = 8 * half;
            const wide g = per_token_gamma ? WIDE_LOAD(&tile->gamma[t][row]) : all_gamma;
            const wide l = per_token_lam ? WIDE_LOAD(&tile->lam[t][row]) : all_lam;
            after[half] = NAMED(token)(tile, t, row, g, l, after[half]);
        }
    for (int half = 0; half < HALVES; half++) carry[half] = after[half];
    for (int t = 0; t < TILE; t++)
        for (int row = 0; row < TILE; row++) tile->value[t][row] += tile->reward[t][row];
}

static void NAMED(gae)(const REAL *rewards, const REAL *values, const uint8_t *mask, int64_t rows, int64_t tokens,
                       const REAL *bootstrap, const REAL *gammas, const REAL *lams, double gamma, double lam,
                       REAL *advantages, REAL *returns) {
    NAMED(tiles) tile;
    double first_value[TILE] = {0};
    for (int64_t i = 0; bootstrap && i < rows; i++) first_value[i] = (double)bootstrap[i];
    NAMED(carried) carry[HALVES];
    for (int half = 0; half < HALVES; half++)
        carry[half] = (NAMED(carried)){wide_load(first_value + 8 * half), wide_set(0.0)};
    for (int64_t start = (tokens - 1) / TILE * TILE; start >= 0; start -= TILE) {
        const int64_t n = tokens - start < TILE ? tokens - start : TILE;
        NAMED(load_tile)(rewards + start, tokens, rows, n, tile.reward[0]);
        NAMED(load_tile)(values + start, tokens, rows, n, tile.value[0]);
        load_tile_bytes(mask + start, tokens, rows, n, tile.mask[0]);
        if (gammas) NAMED(load_tile)(gammas + start, tokens, rows, n, tile.gamma[0]);
        if (lams) NAMED(load_tile)(lams + start, tokens, rows, n, tile.lam[0]);
        if (gammas || lams) NAMED(gae_tile)(&tile, gammas != 0, lams != 0, gamma, lam, carry);
        else NAMED(gae_tile)(&tile, 0, 0, gamma, lam, carry);
        NAMED(store_tile)(tile.reward[0], rows, n, advantages + start, tokens);
        NAMED(store_tile)(tile.value[0], rows, n, returns + start, tokens);
    }
}
