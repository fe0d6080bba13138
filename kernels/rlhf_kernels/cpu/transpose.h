/* Tiles of sixteen rows by sixteen columns, turned over so that a row becomes a lane. */
#ifndef RLHF_TRANSPOSE_H
#define RLHF_TRANSPOSE_H

#include "lanes.h"

#define TILE 16

typedef float four_floats __attribute__((vector_size(16)));
typedef int32_t four_ints __attribute__((vector_size(16)));
typedef uint8_t sixteen_bytes __attribute__((vector_size(16)));

#if defined(__clang__)
#define SHUFFLE(a, b, mask_type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, mask_type, ...) __builtin_shuffle(a, b, (mask_type){__VA_ARGS__})
#endif

/* to[j][i] = from[i][j] for a square of four. */
INLINE void turn_four(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    four_floats a, b, c, d;
    memcpy(&a, from, sizeof a);
    memcpy(&b, from + from_stride, sizeof b);
    memcpy(&c, from + 2 * from_stride, sizeof c);
    memcpy(&d, from + 3 * from_stride, sizeof d);
    const four_floats low_ab = SHUFFLE(a, b, four_ints, 0, 4, 1, 5), high_ab = SHUFFLE(a, b, four_ints, 2, 6, 3, 7);
    const four_floats low_cd = SHUFFLE(c, d, four_ints, 0, 4, 1, 5), high_cd = SHUFFLE(c, d, four_ints, 2, 6, 3, 7);
    a = SHUFFLE(low_ab, low_cd, four_ints, 0, 1, 4, 5);
    b = SHUFFLE(low_ab, low_cd, four_ints, 2, 3, 6, 7);
    c = SHUFFLE(high_ab, high_cd, four_ints, 0, 1, 4, 5);
    d = SHUFFLE(high_ab, high_cd, four_ints, 2, 3, 6, 7);
    memcpy(to, &a, sizeof a);
    memcpy(to + to_stride, &b, sizeof b);
    memcpy(to + 2 * to_stride, &c, sizeof c);
    memcpy(to + 3 * to_stride, &d, sizeof d);
}

INLINE void turn_rows_float(const float *rows, int64_t stride, float *tile) {
    for (int i = 0; i < TILE; i += 4)
        for (int j = 0; j < TILE; j += 4) turn_four(rows + i * stride + j, stride, tile + j * TILE + i, TILE);
}
INLINE void turn_rows_double(const double *rows, int64_t stride, double *tile) {
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) tile[j * TILE + i] = rows[i * stride + j];
}
#define INTERLEAVE_LOW(a, b) SHUFFLE(a, b, sixteen_bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) SHUFFLE(a, b, sixteen_bytes, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

/* Four rounds of interleaving the first eight rows with the last eight turn a square of sixteen over. */
INLINE void turn_rows_bytes(const uint8_t *rows, int64_t stride, uint8_t *tile) {
    sixteen_bytes now[TILE], next[TILE];
    for (int i = 0; i < TILE; i++) memcpy(&now[i], rows + i * stride, TILE);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < TILE / 2; i++) {
            next[2 * i] = INTERLEAVE_LOW(now[i], now[i + 8]);
            next[2 * i + 1] = INTERLEAVE_HIGH(now[i], now[i + 8]);
        }
        memcpy(now, next, sizeof now);
    }
    memcpy(tile, now, sizeof now);
}

/* tile[column][row], 0 where one is missing of sixteen. */
#define LOAD_TILE(name, type)                                                                                           \
    NOT_INLINE void load_part_##name(const type *rows, int64_t stride, int64_t n, int64_t columns, type *tile) {       \
        memset(tile, 0, TILE * TILE * sizeof(type));                                                                   \
        for (int64_t i = 0; i < n; i++)                                                                                \
            for (int64_t j = 0; j < columns; j++) tile[j * TILE + i] = rows[i * stride + j];                           \
    }                                                                                                                  \
    INLINE void load_tile_##name(const type *rows, int64_t stride, int64_t n, int64_t columns, type *tile) {           \
        if (n == TILE && columns == TILE) turn_rows_##name(rows, stride, tile);                                        \
        else load_part_##name(rows, stride, n, columns, tile);                                                         \
    }

/* Rows whose length is a multiple of 4096 bytes share one set of the first-level cache, which does not hold sixteen lines:
 * each line is therefore put together beside and written at once. */
#define STORE_TILE(name, type)                                                                                          \
    INLINE void store_tile_##name(const type *tile, int64_t n, int64_t columns, type *rows, int64_t stride) {          \
        type together[TILE][TILE];                                                                                     \
        turn_rows_##name(tile, TILE, together[0]);                                                                     \
        if (n == TILE && columns == TILE)                                                                              \
            for (int i = 0; i < TILE; i++) memcpy(rows + i * stride, together[i], sizeof together[i]);                 \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++)                                                                            \
                memcpy(rows + i * stride, together[i], (size_t)columns * sizeof(type));                                \
    }

LOAD_TILE(float, float)
LOAD_TILE(double, double)
LOAD_TILE(bytes, uint8_t)
STORE_TILE(float, float)
STORE_TILE(double, double)

#endif
