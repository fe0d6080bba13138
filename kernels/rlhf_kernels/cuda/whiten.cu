// Mean, population variance and scaling over the elements of a mask, in float64.
//
// Every block reads its chunk into registers and takes count, mean and Σ (x - mean)² of it, in two passes over the
// registers. The chunks' moments are joined by Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
// variance", in a tree fixed by the number of elements.
#include "device.cuh"
#include "kernels.h"

namespace rlhf {
namespace {

constexpr int THREADS = 256;
constexpr int THREAD_ELEMENTS = 16;
constexpr int64_t CHUNK = THREADS * THREAD_ELEMENTS;

struct moments {
    double count, mean, squares;
};

// mean, scale and shift of (x - mean) * scale + shift.
struct transform {
    double mean, scale, shift;
};

__device__ inline moments joined(moments a, moments b) {
    if (a.count == 0.0) return b;
    if (b.count == 0.0) return a;
    const double count = a.count + b.count;
    const double difference = b.mean - a.mean, share = b.count / count;
    return {count, fma(difference, share, a.mean), fma(difference * difference, a.count * share, a.squares + b.squares)};
}

template <typename real>
__global__ void __launch_bounds__(THREADS) moments_kernel(const real* x, const uint8_t* mask, int64_t n, moments* chunks) {
    __shared__ double counts[WARP], sums[WARP], squares[WARP];
    const int64_t first = blockIdx.x * CHUNK + threadIdx.x;
    double inside[THREAD_ELEMENTS];
    unsigned counted = 0;
    double sum = 0.0;
#pragma unroll
    for (int k = 0; k < THREAD_ELEMENTS; k++) {
        const int64_t i = first + k * THREADS;
        const bool counts_here = i < n && mask[i];
        inside[k] = counts_here ? static_cast<double>(x[i]) : 0.0;
        counted |= static_cast<unsigned>(counts_here) << k;
        sum += inside[k];
    }
    const double count = group_sum<THREADS>(static_cast<double>(__popc(counted)), counts);
    const double mean = group_sum<THREADS>(sum, sums) / fmax(count, 1.0);
    double square_sum = 0.0;
#pragma unroll
    for (int k = 0; k < THREAD_ELEMENTS; k++) {
        const double deviation = counted >> k & 1 ? inside[k] - mean : 0.0;
        square_sum = fma(deviation, deviation, square_sum);
    }
    square_sum = group_sum<THREADS>(square_sum, squares);
    if (threadIdx.x == 0) chunks[blockIdx.x] = {count, mean, square_sum};
}

__global__ void __launch_bounds__(THREADS)
    join_kernel(const moments* chunks, int64_t count, bool shift_mean, double epsilon, transform* result) {
    __shared__ moments parts[THREADS];
    moments own = {0.0, 0.0, 0.0};
    for (int64_t c = threadIdx.x; c < count; c += THREADS) own = joined(own, chunks[c]);
    parts[threadIdx.x] = own;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] = joined(parts[threadIdx.x], parts[threadIdx.x + half]);
    }
    if (threadIdx.x != 0) return;
    const moments all = parts[0];
    const double variance = all.squares / fmax(all.count, 1.0);
    *result = {all.mean, 1.0 / sqrt(variance + epsilon), shift_mean ? 0.0 : all.mean};
}

template <typename real>
__global__ void __launch_bounds__(THREADS)
    scale_kernel(const real* x, const uint8_t* mask, int64_t n, const transform* by, real* out) {
    const transform t = *by;
    const int64_t first = blockIdx.x * CHUNK + threadIdx.x;
#pragma unroll
    for (int k = 0; k < THREAD_ELEMENTS; k++) {
        const int64_t i = first + k * THREADS;
        if (i < n) out[i] = mask[i] ? static_cast<real>(whitened_of(x[i], t.mean, t.scale, t.shift)) : real{0};
    }
}

}  // namespace

size_t whiten_scratch_bytes(int64_t n) { return sizeof(transform) + divide_up(n, CHUNK) * sizeof(moments); }

template <typename real>
cudaError_t whiten(const real* x, const uint8_t* mask, int64_t n, bool shift_mean, double epsilon, void* scratch,
                   real* out, cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    transform* result = static_cast<transform*>(scratch);
    moments* parts = reinterpret_cast<moments*>(result + 1);
    const int64_t chunks = divide_up(n, CHUNK);
    cudaError_t error = launch(moments_kernel<real>, chunks, THREADS, stream, x, mask, n, parts);
    if (error == cudaSuccess)
        error = launch(join_kernel, 1, THREADS, stream, parts, chunks, shift_mean, epsilon, result);
    if (error == cudaSuccess) error = launch(scale_kernel<real>, chunks, THREADS, stream, x, mask, n, result, out);
    return error;
}

template cudaError_t whiten(const float*, const uint8_t*, int64_t, bool, double, void*, float*, cudaStream_t);
template cudaError_t whiten(const double*, const uint8_t*, int64_t, bool, double, void*, double*, cudaStream_t);

}  // namespace rlhf
