// Enough of CUDA's language and runtime to compile the kernels' own sources with a C++ compiler and run them on a CPU.
//
// Blocks run one after another. The threads of a block are fibres of one CPU thread that change hands only where CUDA
// threads wait for each other (barriers, shuffles), in an order that the test chooses: a kernel that lacks a barrier gives
// results that depend on the order. Memory is the process's own, so reading past a tensor can be made to fault.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx;

namespace emulation {

// Runs body in every thread of every block.
void run(dim3 grid, dim3 threads, const std::function<void()>& body);
// Waits for all threads of the block.
void block_barrier();
// Stops the process where the bytes are misaligned for their size, which a GPU would not read, or lie outside of every
// range that `emulation_allow` named.
void check_read(const void* address, size_t size);
// Gives every lane of the warp a look at what each lane brought: 32 values of `size` bytes, valid until the next call.
const void* warp_exchange(const void* mine, size_t size);

template <typename T>
T of_lane(T mine, int lane) {
    return static_cast<const T*>(warp_exchange(&mine, sizeof mine))[lane];
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    emulation::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
    return cudaSuccess;
}

inline int emulated_lane() { return static_cast<int>(threadIdx.x % 32); }
inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) {
    char nothing = 0;
    emulation::warp_exchange(&nothing, 1);
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulation::of_lane(x, lane % 32);
}
template <typename T>
T __shfl_down_sync(unsigned, T x, int step) {
    return emulation::of_lane(x, emulated_lane() + step < 32 ? emulated_lane() + step : emulated_lane());
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulation::of_lane(x, emulated_lane() ^ mask);
}

template <typename T>
T __ldg(const T* address) {
    emulation::check_read(address, sizeof(T));
    return *address;
}
inline void __stcs(uint4* address, uint4 x) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(uint4) != 0) __builtin_trap();
    *address = x;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned shift) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
