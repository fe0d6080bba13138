/* Squares of sixteen rows by sixteen columns of bytes, turned over so that a row becomes a lane. */
#ifndef RLHF_TRANSPOSE_H
#define RLHF_TRANSPOSE_H

#include "lanes.h"

typedef uint8_t sixteen_bytes __attribute__((vector_size(16)));

#if defined(__clang__)
#define BYTES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BYTES(a, b, ...) __builtin_shuffle(a, b, (sixteen_bytes){__VA_ARGS__})
#endif
#define INTERLEAVE_LOW(a, b) BYTES(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) BYTES(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

/* to[j][i] = from[i][j], by four rounds of interleaving the first eight rows with the last eight. */
INLINE void turn_bytes(const uint8_t *from, int64_t stride, uint8_t to[16][16]) {
    sixteen_bytes now[16], next[16];
    for (int i = 0; i < 16; i++) memcpy(&now[i], from + i * stride, 16);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            next[2 * i] = INTERLEAVE_LOW(now[i], now[i + 8]);
            next[2 * i + 1] = INTERLEAVE_HIGH(now[i], now[i + 8]);
        }
        memcpy(now, next, sizeof now);
    }
    memcpy(to, now, sizeof now);
}

#endif
