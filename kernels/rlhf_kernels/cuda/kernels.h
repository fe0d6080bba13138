// What binding.cpp calls: each function launches its kernels on a stream and returns the first error of a launch.
// Pointers are to the memory of one device, which is the current one. Nothing is allocated, nothing waits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace rlhf {

enum class element { float32, bfloat16, float16 };

// Row r of the logits starts (r / inner) * outer_stride + (r % inner) * inner_stride elements after the first.
struct logit_rows {
    const void* logits;
    element type;
    int64_t rows, inner, outer_stride, inner_stride, vocabulary;
    const int64_t* labels;
    bool ignoring;
    int64_t ignore_index;
    double inverse_temperature;
};

// logp[rows], entropy[rows] or nullptr, statistics[rows, 2]: see rows.h.
cudaError_t token_logprobs(const logit_rows& in, float* logp, float* entropy, float* statistics, cudaStream_t stream);

// grad_logits[rows, vocabulary]; a null gradient means 0.
cudaError_t token_logprobs_backward(const logit_rows& in, const float* statistics, const float* entropy,
                                    const float* grad_logp, const float* grad_entropy, void* grad_logits,
                                    cudaStream_t stream);

// All [rows, tokens], contiguous; bootstrap[rows] or nullptr. gammas and lams take the place of gamma and lam unless they
// are nullptr.
template <typename real>
struct gae_batch {
    const real *rewards, *values;
    const uint8_t* mask;
    const real *bootstrap, *gammas, *lams;
    double gamma, lam;
    int64_t rows, tokens;
    real *advantages, *returns;
};

// Bytes of scratch memory that `gae` needs, 8-byte aligned.
size_t gae_scratch_bytes(int64_t rows, int64_t tokens);
template <typename real>
cudaError_t gae(const gae_batch<real>& batch, void* scratch, cudaStream_t stream);

size_t whiten_scratch_bytes(int64_t n);
template <typename real>
cudaError_t whiten(const real* x, const uint8_t* mask, int64_t n, bool shift_mean, double epsilon, void* scratch,
                   real* out, cudaStream_t stream);

}  // namespace rlhf
