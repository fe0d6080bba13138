// What the CUDA kernels share: launching, warps, 16-byte reads at any address, half precision.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../shared/scalar.h"

namespace rlhf {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- reductions: fixed trees, so the same bits on every run ----

__device__ inline double warp_sum(double x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// NaN is passed over.
__device__ inline float warp_largest(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Over the THREADS that work together: a warp, or the whole block. Every thread gets the result; `slot` is one element of
// shared memory a warp, not in use by anything else until the next barrier.
template <int THREADS>
__device__ float group_largest(float x, float* slot) {
    x = warp_largest(x);
    if constexpr (THREADS > WARP) {
        if (threadIdx.x % WARP == 0) slot[threadIdx.x / WARP] = x;
        __syncthreads();
        x = slot[0];
#pragma unroll
        for (int w = 1; w < THREADS / WARP; w++) x = fmaxf(x, slot[w]);
    }
    return x;
}

template <int THREADS>
__device__ double group_sum(double x, double* slot) {
    x = warp_sum(x);
    if constexpr (THREADS > WARP) {
        if (threadIdx.x % WARP == 0) slot[threadIdx.x / WARP] = x;
        __syncthreads();
        x = slot[0];
#pragma unroll
        for (int w = 1; w < THREADS / WARP; w++) x += slot[w];
    }
    return x;
}

// 2^t, 0 where float32 would be subnormal, NaN for NaN. The processor's own, within 2^-22: a polynomial would take more
// instructions than there are while 16-bit logits arrive.
__device__ inline float exp2_approximate(float t) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
    return result;
#else
    float result = exp2f(t);
    return result < 0x1p-126f ? 0.0f : result;
#endif
}

// ---- element types ----

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widened(float16 x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
#else
    _Float16 half;
    memcpy(&half, &x.bits, sizeof half);
    return static_cast<float>(half);
#endif
}

// To nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ T narrowed(float x);
template <>
__device__ inline float narrowed<float>(float x) {
    return x;
}
template <>
__device__ inline bfloat16 narrowed<bfloat16>(float x) {
    bfloat16 result;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    uint32_t bits = __float_as_uint(x);
    result.bits = x == x ? static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : uint16_t{0x7FFF};
#endif
    return result;
}
template <>
__device__ inline float16 narrowed<float16>(float x) {
    float16 result;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    _Float16 half = static_cast<_Float16>(x);
    memcpy(&result.bits, &half, sizeof half);
#endif
    return result;
}

// ---- sixteen bytes at a time ----

// The elements of one 16-byte read.
template <typename T>
constexpr int VECTOR = 16 / sizeof(T);

template <typename T>
struct alignas(16) vector {
    T element[VECTOR<T>];
};

template <typename T>
__device__ inline vector<T> as_vector(uint4 words) {
    vector<T> v;
    memcpy(&v, &words, sizeof v);
    return v;
}

template <typename T>
__device__ inline uint4 as_words(const vector<T>& v) {
    uint4 words;
    memcpy(&words, &v, sizeof words);
    return words;
}

// Bytes skew..skew+15 of two neighbouring aligned blocks.
__device__ inline uint4 realigned(uint4 low, uint4 high, unsigned skew) {
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int k = 0; k < 6; k++) w[k] = skew & 8 ? w[k + 2] : w[k];
#pragma unroll
    for (int k = 0; k < 5; k++) w[k] = skew & 4 ? w[k + 1] : w[k];
    unsigned bits = skew % 4 * 8;
    return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// A row that starts at any element: vector i holds elements VECTOR*i and on, wherever the row lies in memory, so what a
// thread adds up, and the bits of the result, do not depend on the row's place.
template <typename T>
struct row_reader {
    const T* row;
    const uint4* blocks;
    unsigned skew;
    int64_t size;

    __device__ row_reader(const T* start, int64_t length)
        : row(start),
          blocks(reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(start) & ~uintptr_t{15})),
          skew(static_cast<unsigned>(reinterpret_cast<uintptr_t>(start) & 15)),
          size(length) {}

    // Vectors that `whole` can read without touching a byte behind the row. One fewer than there may be: the count must
    // not depend on the row's place either.
    __device__ int64_t whole_vectors() const { return size / VECTOR<T> > 0 ? size / VECTOR<T> - 1 : 0; }
    __device__ int64_t vectors() const { return divide_up(size, VECTOR<T>); }

    __device__ vector<T> whole(int64_t i) const {
        uint4 low = __ldg(blocks + i);
        return as_vector<T>(skew == 0 ? low : realigned(low, __ldg(blocks + i + 1), skew));
    }

    // The elements that there are; the others take `padding`.
    __device__ vector<T> partial(int64_t i, T padding) const {
        vector<T> v;
#pragma unroll
        for (int k = 0; k < VECTOR<T>; k++) {
            int64_t at = i * VECTOR<T> + k;
            v.element[k] = at < size ? row[at] : padding;
        }
        return v;
    }
};

}  // namespace rlhf
