/* A matrix product, each element of which is Σ_k a[m, k] b[k, n] added one after the other, k from 0 up.
 *
 * So an element has the same bits whatever rows and columns stand beside it, however the matrices lie in memory, and
 * however they are cut into tiles, which differs by instruction set. The cuts follow Goto and van de Geijn, "Anatomy of
 * High-Performance Matrix Multiplication" (2008): a tile of c lives in registers, the rows of a that it needs in the
 * first cache, some columns of b in the second.
 */
#ifndef RLHF_PRODUCT_H
#define RLHF_PRODUCT_H

#include "lanes.h"

#if defined(__AVX512F__)
#define TILE_ROWS 14 /* 28 registers for a tile of c, two for a row of b, one for an element of a */
#define TILE_VECTORS 2
#else
#define TILE_ROWS 6 /* 12, two, one: a vector is two registers */
#define TILE_VECTORS 1
#endif
#define TILE_COLUMNS (TILE_VECTORS * LANES)
_Static_assert(WIDEST_TILE % TILE_COLUMNS == 0, "threads share out whole tiles");
#define BLOCK_COLUMNS 256 /* of b, with BLOCK_DEPTH of its rows: 384 KiB */
#define BLOCK_DEPTH 384
#define READ_IN_PLACE 64 /* Rows of a, up to which it does not pay to copy b. */
#define CROWDED 1024      /* Rows this many floats apart, or a multiple, share one place of the first cache. */
#define AHEAD 48          /* Floats that a row of b is asked for before they are laid out. */
#define LEFT (TILE_ROWS * (BLOCK_DEPTH + LANES) + LANES)
_Static_assert(PRODUCT_SCRATCH >= BLOCK_COLUMNS * BLOCK_DEPTH + LEFT, "a block of b and a tile of a fit");

/* c[rows, TILE_COLUMNS], which starts as it is, as `bias` or as 0, plus a b; and, where it is not NULL, `residual`. */
INLINE void tile(int rows, const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, int64_t depth,
                 int add, const float *bias, const float *residual, int64_t residual_row, float *c, int64_t c_row) {
    lanes sum[TILE_ROWS][TILE_VECTORS];
    const float *three[(TILE_ROWS + 2) / 3]; /* Rows of a: an address can be one, two or no strides further. */
    for (int r = 0; r < rows; r += 3) three[r / 3] = a + r * a_row;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++)
            sum[r][v] = add    ? lanes_load(c + r * c_row + v * LANES)
                        : bias ? lanes_load(bias + v * LANES)
                               : lanes_set(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        lanes right[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) right[v] = lanes_load(b + v * LANES);
        b += b_k;
        for (int r = 0; r < rows; r++) {
            const lanes left = lanes_set(three[r / 3][r % 3 * a_row]);
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = lanes_fma(left, right[v], sum[r][v]);
        }
        for (int r = 0; r < rows; r += 3) three[r / 3] += a_k;
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            const lanes whole = sum[r][v];
            lanes_store(c + r * c_row + v * LANES,
                        residual ? lanes_add(lanes_load(residual + r * residual_row + v * LANES), whole) : whole);
        }
}

/* The same of a number of rows that is not known to the compiler. */
static void some_rows(int rows, const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, int64_t depth,
                      int add, const float *bias, const float *residual, int64_t residual_row, float *c,
                      int64_t c_row) {
#define TILE_OF(n)                                                                                    \
    case n:                                                                                           \
        if (a_k == 1) tile(n, a, a_row, 1, b, b_k, depth, add, bias, residual, residual_row, c, c_row); \
        else tile(n, a, 1, n, b, b_k, depth, add, bias, residual, residual_row, c, c_row);            \
        break;
    switch (rows) {
        TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6)
#if TILE_ROWS > 6
        TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10) TILE_OF(11) TILE_OF(12) TILE_OF(13) TILE_OF(14)
#endif
    }
#undef TILE_OF
}

/* packed[depth, rows] of rows of a that lie side by side in memory; what is written behind the last is not read. */
INLINE void pack_rows(const float *a, int64_t a_k, int rows, int64_t depth, float *packed) {
    int64_t k = 0;
#if defined(__AVX512F__)
    for (; k < depth; k++) lanes_store(packed + k * rows, lanes_load_first(a + k * a_k, rows));
#else
    enum { SOME = 8 }; /* More than a tile has, in one or two moves; they lie before the next column of a. */
    _Static_assert(TILE_ROWS <= SOME, "a move holds the rows of a tile");
    for (; a_k >= SOME && k + 1 < depth; k++) memcpy(packed + k * rows, a + k * a_k, SOME * sizeof(float));
    for (; k < depth; k++)
        for (int r = 0; r < rows; r++) packed[k * rows + r] = a[k * a_k + r];
#endif
}

/* One tile: packed[depth, TILE_COLUMNS] of b's columns, zeros behind the last. */
static void pack_tile(const float *b, int64_t b_k, int64_t b_n, int64_t depth, int64_t columns, float *packed) {
    int64_t n = 0;
    for (; n + LANES <= columns; n += LANES) {
        int64_t k = 0;
        if (b_n == 1)
            for (; k < depth; k++) lanes_store(packed + k * TILE_COLUMNS + n, lanes_load(b + k * b_k + n));
        else if (b_k == 1)
            for (; k + 4 <= depth; k += 4) {
                lanes square[4]; /* quarter q of square[j]: column n + 4 q + j */
                if (k % LANES == 0)
                    for (int j = 0; j < LANES; j++) __builtin_prefetch(b + (n + j) * b_n + k + AHEAD);
                for (int j = 0; j < 4; j++) square[j] = lanes_load_quarters(b + (n + j) * b_n + k, 4 * b_n);
                lanes_turn_quarters(square);
                for (int j = 0; j < 4; j++) lanes_store(packed + (k + j) * TILE_COLUMNS + n, square[j]);
            }
        for (; k < depth; k++)
            for (int64_t i = n; i < n + LANES; i++) packed[k * TILE_COLUMNS + i] = b[k * b_k + i * b_n];
    }
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = n; i < TILE_COLUMNS; i++)
            packed[k * TILE_COLUMNS + i] = i < columns ? b[k * b_k + i * b_n] : 0.0f;
}

/* Tiles of b's columns one behind the other. Where columns lie side by side, b is read row by row. */
static void pack_columns(const float *b, int64_t b_k, int64_t b_n, int64_t depth, int64_t columns, float *packed) {
    const int64_t whole = b_n == 1 ? columns / TILE_COLUMNS * TILE_COLUMNS : 0;
    for (int64_t k = 0; k < (whole ? depth : 0); k++)
        for (int64_t n = 0; n < whole; n += TILE_COLUMNS)
            for (int64_t v = 0; v < TILE_COLUMNS; v += LANES)
                lanes_store(packed + n * depth + k * TILE_COLUMNS + v, lanes_load(b + k * b_k + n + v));
    for (int64_t n = whole; n < columns; n += TILE_COLUMNS)
        pack_tile(b + n * b_n, b_k, b_n, depth, columns - n < TILE_COLUMNS ? columns - n : TILE_COLUMNS,
                  packed + n * depth);
}

/* A tile whose columns end inside it. */
static void edge(int rows, const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t depth, int64_t columns,
                 int add, const float *bias, const float *residual, int64_t residual_row, float *c, int64_t c_row) {
    float whole[TILE_ROWS * TILE_COLUMNS], kept[TILE_ROWS * TILE_COLUMNS] = {0}, start[TILE_COLUMNS] = {0};
    const size_t bytes = (size_t)columns * sizeof(float);
    if (add)
        for (int64_t r = 0; r < rows; r++) memcpy(whole + r * TILE_COLUMNS, c + r * c_row, bytes);
    if (bias) memcpy(start, bias, bytes);
    if (residual)
        for (int64_t r = 0; r < rows; r++) memcpy(kept + r * TILE_COLUMNS, residual + r * residual_row, bytes);
    some_rows(rows, a, a_row, a_k, b, TILE_COLUMNS, depth, add, bias ? start : NULL, residual ? kept : NULL,
              TILE_COLUMNS, whole, TILE_COLUMNS);
    for (int64_t r = 0; r < rows; r++) memcpy(c + r * c_row, whole + r * TILE_COLUMNS, bytes);
}

/* c[rows, columns] = a b + bias, or c + a b where `add`; plus residual[rows, columns], which may be NULL as bias may.
 * a[rows, depth] and b[depth, columns] have the strides given, one of a's being 1; rows of c and residual lie c_row and
 * residual_row apart. scratch[PRODUCT_SCRATCH] is aligned to 64 bytes. */
static void multiply(const float *a, int64_t a_row, int64_t a_k, const float *b, int64_t b_k, int64_t b_n, int64_t rows,
                     int64_t depth, int64_t columns, int add, const float *bias, const float *residual,
                     int64_t residual_row, float *scratch, float *c, int64_t c_row) {
    float *const packed = scratch + (LEFT + LANES - 1) / LANES * LANES;
    const int crowded = a_k == 1 && a_row % CROWDED == 0 && columns > TILE_COLUMNS;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, blocks = (depth + BLOCK_DEPTH - 1) / BLOCK_DEPTH;
    const int in_place = b_n == 1 && rows <= READ_IN_PLACE;
    for (int64_t n = 0; n < columns; n += BLOCK_COLUMNS)
        for (int64_t block = 0; block < (blocks ? blocks : 1); block++) {
            const int64_t k = blocks ? block * depth / blocks : 0;
            const int64_t deep = blocks ? (block + 1) * depth / blocks - k : 0;
            const int64_t end = columns < n + BLOCK_COLUMNS ? columns : n + BLOCK_COLUMNS;
            const int more = add || block > 0, last = block + 1 >= blocks;
            const int64_t first = in_place ? end - (end - n) % TILE_COLUMNS : n; /* columns that are packed */
            pack_columns(b + k * b_k + first * b_n, b_k, b_n, deep, end - first, packed + (first - n) * deep);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t m = t * rows / tiles;
                const int here = (int)((t + 1) * rows / tiles - m);
                const int64_t left_row = crowded ? deep + LANES : a_row;
                const float *left = a + m * a_row + k * a_k;
                if (a_k != 1) {
                    pack_rows(left, a_k, here, deep, scratch);
                    left = scratch;
                } else if (crowded) {
                    for (int r = 0; r < here; r++)
                        memcpy(scratch + r * left_row, left + r * a_row, (size_t)deep * sizeof(float));
                    left = scratch;
                }
                for (int64_t i = n; i < end; i += TILE_COLUMNS) {
                    const int whole = i + TILE_COLUMNS <= end, direct = in_place && whole;
                    const float *right = direct ? b + k * b_k + i : packed + (i - n) * deep;
                    const int64_t right_k = direct ? b_k : TILE_COLUMNS;
                    const float *start = bias ? bias + i : NULL;
                    const float *beside = residual && last ? residual + m * residual_row + i : NULL;
                    float *out = c + m * c_row + i;
                    if (whole)
                        some_rows(here, left, left_row, a_k, right, right_k, deep, more, start, beside, residual_row,
                                  out, c_row);
                    else
                        edge(here, left, left_row, a_k, right, deep, end - i, more, start, beside, residual_row, out,
                             c_row);
                }
            }
        }
}

#endif
