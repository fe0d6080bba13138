// Log-probability of a label and entropy of a row of logits in one read, and their gradient.
//
// Online normaliser: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3, with the elements of UNROLL vectors as a
// step. A thread's vectors are given by their place in the row, threads are joined in float64 by a fixed tree: a row's
// bits depend on that row alone, not on its address or on the other rows.
#include <cassert>
#include <cstdio>

#include "device.cuh"
#include "kernels.h"

namespace rlhf {
namespace {

constexpr int UNROLL = 4;              // 64 bytes in flight a thread
constexpr int ROW_THREADS = 512;       // a block for a long row,
constexpr int ROWS_A_BLOCK = 8;        // a warp for a short one:
constexpr int64_t SHORT_ROW_BYTES = 8192;
constexpr int GRADIENT_THREADS = 256;
constexpr int GRADIENT_UNROLL = 2;

template <int THREADS>
constexpr int BLOCK = THREADS == WARP ? ROWS_A_BLOCK * WARP : THREADS;

// What a thread has read: the maximum, and Σ 2^t and Σ t 2^t for t = (x - maximum) * scale.
struct softmax_part {
    float largest, sum, weighted;
};

__device__ void move_reference(softmax_part& part, float largest, float scale, bool weighted) {
    float change = (part.largest - reference_of(largest)) * scale;
    float factor = exp2_approximate(change);
    if (weighted) part.weighted = factor * fmaf(fmaxf(change, LOWEST_EXPONENT), part.sum, part.weighted);
    part.sum *= factor;
    part.largest = largest;
}

template <int COUNT, bool WEIGHTED, typename T>
__device__ void add(softmax_part& part, const vector<T> (&vectors)[COUNT], float scale) {
    constexpr int N = COUNT * VECTOR<T>;
    float x[N], largest = part.largest;
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = widened(vectors[i / VECTOR<T>].element[i % VECTOR<T>]);
        largest = fmaxf(largest, x[i]);  // NaN is passed over: the sums will show it
    }
    move_reference(part, largest, scale, WEIGHTED);
    const float reference = reference_of(largest);
    float sum[4] = {}, weighted[4] = {};
#pragma unroll
    for (int i = 0; i < N; i++) {
        float t = (x[i] - reference) * scale;
        float e = exp2_approximate(t);
        sum[i % 4] += e;
        if (WEIGHTED) weighted[i % 4] = fmaf(e, fmaxf(t, LOWEST_EXPONENT), weighted[i % 4]);
    }
    part.sum += (sum[0] + sum[2]) + (sum[1] + sum[3]);
    part.weighted += (weighted[0] + weighted[2]) + (weighted[1] + weighted[3]);
}

template <typename T>
__device__ const T* row_of(const logit_rows& in, int64_t row) {
    return static_cast<const T*>(in.logits) + row / in.inner * in.outer_stride + row % in.inner * in.inner_stride;
}

__device__ void require_label(int64_t label, int64_t row, int64_t vocabulary) {
    if (label >= 0 && label < vocabulary) return;
    printf("rlhf_kernels: label %lld of row %lld is outside [0, %lld)\n", static_cast<long long>(label),
           static_cast<long long>(row), static_cast<long long>(vocabulary));
    assert(false && "rlhf_kernels: a label is out of range");
}

template <typename T, int THREADS, bool WITH_ENTROPY>
__global__ void __launch_bounds__(BLOCK<THREADS>, 1024 / BLOCK<THREADS>)
    forward_kernel(logit_rows in, float* logp, float* entropy, float* statistics) {
    const int lane = static_cast<int>(threadIdx.x) % THREADS;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (BLOCK<THREADS> / THREADS) + threadIdx.x / THREADS;
    if (row >= in.rows) return;
    const int64_t label = in.labels[row];
    if (in.ignoring && label == in.ignore_index) {
        if (lane == 0) {
            logp[row] = statistics[2 * row] = statistics[2 * row + 1] = 0.0f;
            if (WITH_ENTROPY) entropy[row] = 0.0f;
        }
        return;
    }

    const row_reader<T> reader(row_of<T>(in, row), in.vocabulary);
    const float scale = scale_from(in.inverse_temperature);
    const T nothing = narrowed<T>(-__builtin_inff());
    const int64_t whole = reader.whole_vectors();
    softmax_part part = {-__builtin_inff(), 0.0f, 0.0f};
    for (int64_t start = 0; start < whole; start += THREADS * UNROLL) {
        vector<T> vectors[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            int64_t i = start + k * THREADS + lane;
            if (i < whole) {
                vectors[k] = reader.whole(i);
            } else {
#pragma unroll
                for (int j = 0; j < VECTOR<T>; j++) vectors[k].element[j] = nothing;
            }
        }
        add<UNROLL, WITH_ENTROPY>(part, vectors, scale);
    }
    if (whole + lane < reader.vectors()) {
        const vector<T> last[1] = {reader.partial(whole + lane, nothing)};
        add<1, WITH_ENTROPY>(part, last, scale);
    }

    __shared__ float warp_maxima[WARP];
    __shared__ double warp_sums[WARP], warp_weighted[WARP];
    const float largest = group_largest<THREADS>(part.largest, warp_maxima);
    move_reference(part, largest, scale, WITH_ENTROPY);
    const double sum = group_sum<THREADS>(static_cast<double>(part.sum), warp_sums);
    const double weighted = WITH_ENTROPY ? group_sum<THREADS>(static_cast<double>(part.weighted), warp_weighted) : 0.0;
    if (lane != 0) return;
    require_label(label, row, in.vocabulary);
    if (!sums_are_of_a_distribution(largest, sum)) {
        logp[row] = statistics[2 * row] = statistics[2 * row + 1] = CANONICAL_NAN;
        if (WITH_ENTROPY) entropy[row] = CANONICAL_NAN;
        return;
    }
    const double log2_sum = double_log2(sum);
    logp[row] = logp_of(widened(reader.row[label]), largest, log2_sum, in.inverse_temperature);
    if (WITH_ENTROPY) entropy[row] = entropy_of(log2_sum, sum, weighted);
    statistics[2 * row] = largest;
    statistics[2 * row + 1] = static_cast<float>(log2_sum);
}

// The gradient of one row. Where the upstream gradient is 0 nothing is read, so NaN under a mask does not spread.
struct row_gradient {
    bool constant;
    float fill, largest, scale, minus_log2_sum;
    gradient_line line;
    int64_t label;

    __device__ row_gradient(const logit_rows& in, int64_t row, const float* statistics, const float* entropy,
                            const float* grad_logp, const float* grad_entropy) {
        label = in.labels[row];
        const bool ignored = in.ignoring && label == in.ignore_index;
        const float g = ignored || grad_logp == nullptr ? 0.0f : grad_logp[row];
        const float h = ignored || grad_entropy == nullptr ? 0.0f : grad_entropy[row];
        largest = statistics[2 * row];
        minus_log2_sum = -statistics[2 * row + 1];
        scale = scale_from(in.inverse_temperature);
        line = gradient_line_of(g, h, grad_entropy == nullptr ? 0.0f : entropy[row], in.inverse_temperature);
        label = ignored ? -1 : label;
        const bool none = g == 0.0f && h == 0.0f;
        constant = none || minus_log2_sum != minus_log2_sum || g != g || h != h;
        fill = none ? 0.0f : CANONICAL_NAN;
    }

    __device__ float at(float x, int64_t position) const {
        float t = fmaxf(fmaf(x - largest, scale, minus_log2_sum), LOWEST_EXPONENT);
        float gradient = -exp2_approximate(t) * fmaf(line.slope, t, line.at_zero);
        return position == label ? gradient + line.at_label : gradient;
    }
};

// A group of THREADS writes GRADIENT_UNROLL vectors each and goes on `groups` groups further; vectors are aligned where they are
// written. Which thread computes an element does not change its bits.
template <typename T, int THREADS>
__global__ void __launch_bounds__(GRADIENT_THREADS, 4)
    backward_kernel(logit_rows in, const float* statistics, const float* entropy, const float* grad_logp,
                    const float* grad_entropy, T* grad_logits, int64_t groups) {
    const int lane = static_cast<int>(threadIdx.x) % THREADS;
    const int64_t id = static_cast<int64_t>(blockIdx.x) * (GRADIENT_THREADS / THREADS) + threadIdx.x / THREADS;
    const int64_t row = id / groups, group = id % groups;
    if (row >= in.rows) return;
    const row_gradient gradient(in, row, statistics, entropy, grad_logp, grad_entropy);
    const T* from = row_of<T>(in, row);
    T* to = grad_logits + row * in.vocabulary;
    const int64_t before = (-reinterpret_cast<uintptr_t>(to) & 15) / sizeof(T);
    const int64_t head = before < in.vocabulary ? before : in.vocabulary;
    const row_reader<T> reader(from + head, in.vocabulary - head);
    const int64_t whole = reader.whole_vectors();

    for (int64_t start = group * THREADS * GRADIENT_UNROLL; start < whole; start += groups * THREADS * GRADIENT_UNROLL) {
        vector<T> vectors[GRADIENT_UNROLL];
#pragma unroll
        for (int k = 0; k < GRADIENT_UNROLL; k++) {
            int64_t i = start + k * THREADS + lane;
            if (i < whole && !gradient.constant) vectors[k] = reader.whole(i);
        }
#pragma unroll
        for (int k = 0; k < GRADIENT_UNROLL; k++) {
            int64_t i = start + k * THREADS + lane;
            if (i >= whole) break;
            vector<T> out;
#pragma unroll
            for (int j = 0; j < VECTOR<T>; j++)
                out.element[j] = narrowed<T>(gradient.constant ? gradient.fill
                                                               : gradient.at(widened(vectors[k].element[j]),
                                                                             head + i * VECTOR<T> + j));
            __stcs(reinterpret_cast<uint4*>(to + head) + i, as_words(out));
        }
    }
    if (group != 0) return;
    // What is left: before the first aligned vector, and less than two vectors at the end.
    const int64_t loose = in.vocabulary - whole * VECTOR<T>;
    for (int64_t n = lane; n < loose; n += THREADS) {
        int64_t at = n < head ? n : n + whole * VECTOR<T>;
        to[at] = narrowed<T>(gradient.constant ? gradient.fill : gradient.at(widened(from[at]), at));
    }
}

template <typename T>
bool is_short(const logit_rows& in) {
    return in.vocabulary * static_cast<int64_t>(sizeof(T)) <= SHORT_ROW_BYTES;
}

template <typename T, bool WITH_ENTROPY>
cudaError_t forward(const logit_rows& in, float* logp, float* entropy, float* statistics, cudaStream_t stream) {
    if (is_short<T>(in))
        return launch(forward_kernel<T, WARP, WITH_ENTROPY>, divide_up(in.rows, ROWS_A_BLOCK), BLOCK<WARP>, stream,
                      in, logp, entropy, statistics);
    return launch(forward_kernel<T, ROW_THREADS, WITH_ENTROPY>, in.rows, ROW_THREADS, stream, in, logp, entropy,
                  statistics);
}

template <typename T>
cudaError_t forward(const logit_rows& in, float* logp, float* entropy, float* statistics, cudaStream_t stream) {
    return entropy == nullptr ? forward<T, false>(in, logp, entropy, statistics, stream)
                              : forward<T, true>(in, logp, entropy, statistics, stream);
}

template <typename T>
cudaError_t backward(const logit_rows& in, const float* statistics, const float* entropy, const float* grad_logp,
                     const float* grad_entropy, void* grad_logits, cudaStream_t stream) {
    T* out = static_cast<T*>(grad_logits);
    if (is_short<T>(in))
        return launch(backward_kernel<T, WARP>, divide_up(in.rows, GRADIENT_THREADS / WARP), GRADIENT_THREADS, stream, in,
                      statistics, entropy, grad_logp, grad_entropy, out, 1);
    const int64_t groups = divide_up(in.vocabulary, GRADIENT_THREADS * GRADIENT_UNROLL * VECTOR<T>);
    return launch(backward_kernel<T, GRADIENT_THREADS>, in.rows * groups, GRADIENT_THREADS, stream, in, statistics,
                  entropy, grad_logp, grad_entropy, out, groups);
}

}  // namespace

cudaError_t token_logprobs(const logit_rows& in, float* logp, float* entropy, float* statistics, cudaStream_t stream) {
    if (in.rows == 0) return cudaSuccess;
    if (in.type == element::float32) return forward<float>(in, logp, entropy, statistics, stream);
    if (in.type == element::bfloat16) return forward<bfloat16>(in, logp, entropy, statistics, stream);
    return forward<float16>(in, logp, entropy, statistics, stream);
}

cudaError_t token_logprobs_backward(const logit_rows& in, const float* statistics, const float* entropy,
                                    const float* grad_logp, const float* grad_entropy, void* grad_logits,
                                    cudaStream_t stream) {
    if (in.rows == 0) return cudaSuccess;
    if (in.type == element::float32)
        return backward<float>(in, statistics, entropy, grad_logp, grad_entropy, grad_logits, stream);
    if (in.type == element::bfloat16)
        return backward<bfloat16>(in, statistics, entropy, grad_logp, grad_entropy, grad_logits, stream);
    return backward<float16>(in, statistics, entropy, grad_logp, grad_entropy, grad_logits, stream);
}

}  // namespace rlhf
