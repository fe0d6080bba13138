// The CUDA kernels behind the operators of ops.py, registered through torch's stable ABI: one binary for torch 2.11 and
// later. Outputs and scratch memory come from torch's allocator and work is queued on the current stream of the tensors'
// device, so calls can be captured in a CUDA graph. Shapes, dtypes and devices are checked in api.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double WHITEN_EPSILON = 1e-8;  // reference.py

// Makes a tensor's device the current one, and knows its current stream.
class Device {
   public:
    explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
    }
    cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

   private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

const uint8_t* mask_data(const Tensor& mask) { return reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()); }

Tensor scratch_memory(const Tensor& like, size_t bytes) {
    const std::vector<int64_t> shape = {static_cast<int64_t>((bytes + sizeof(double) - 1) / sizeof(double))};
    return torch::stable::new_empty(like, shape, ScalarType::Double);
}

rlhf::element element_of(const Tensor& logits) {
    if (logits.scalar_type() == ScalarType::Float) return rlhf::element::float32;
    if (logits.scalar_type() == ScalarType::BFloat16) return rlhf::element::bfloat16;
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Half, "logits must be float32, bfloat16 or float16");
    return rlhf::element::float16;
}

// Sizes and strides of the rows, outermost first, neighbours merged where one stride describes both.
std::vector<std::pair<int64_t, int64_t>> merged_rows(const Tensor& logits) {
    std::vector<std::pair<int64_t, int64_t>> merged;
    for (int64_t d = 0; d + 1 < logits.dim(); d++) {
        const int64_t size = logits.size(d), stride = logits.stride(d);
        if (size == 1) continue;
        if (!merged.empty() && merged.back().second == size * stride)
            merged.back() = {merged.back().first * size, stride};
        else
            merged.emplace_back(size, stride);
    }
    return merged;
}

// Rows are read in place where two strides describe them (a slice such as logits[:, :-1] too), else from a copy.
struct Rows {
    Tensor logits, labels;
    rlhf::logit_rows view;

    Rows(const Tensor& any_logits, const Tensor& any_labels, double temperature, std::optional<int64_t> ignore_index)
        : logits(any_logits), labels(dense(any_labels)) {
        const int64_t vocabulary = logits.size(logits.dim() - 1);
        if ((vocabulary > 1 && logits.stride(logits.dim() - 1) != 1) || merged_rows(logits).size() > 2)
            logits = torch::stable::contiguous(logits);
        const auto merged = merged_rows(logits);
        view.logits = logits.const_data_ptr();
        view.type = element_of(logits);
        view.rows = labels.numel();
        view.inner = merged.size() == 2 ? merged[1].first : 1;
        view.outer_stride = merged.empty() ? 0 : merged[0].second;
        view.inner_stride = merged.size() == 2 ? merged[1].second : 0;
        view.vocabulary = vocabulary;
        view.labels = labels.const_data_ptr<int64_t>();
        view.ignoring = ignore_index.has_value();
        view.ignore_index = ignore_index.value_or(0);
        view.inverse_temperature = 1.0 / temperature;
    }
};

std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& labels, double temperature,
                                                  bool with_entropy, std::optional<int64_t> ignore_index) {
    const Device device(logits);
    const Rows rows(logits, labels, temperature, ignore_index);
    std::vector<int64_t> shape(labels.sizes().begin(), labels.sizes().end()), statistics_shape = shape;
    statistics_shape.push_back(2);
    const std::vector<int64_t> nothing = {0};
    Tensor logp = torch::stable::new_empty(logits, shape, ScalarType::Float);
    Tensor entropy = torch::stable::new_empty(logits, with_entropy ? shape : nothing, ScalarType::Float);
    Tensor statistics = torch::stable::new_empty(logits, statistics_shape, ScalarType::Float);
    STD_CUDA_CHECK(rlhf::token_logprobs(rows.view, logp.mutable_data_ptr<float>(),
                                        with_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
                                        statistics.mutable_data_ptr<float>(), device.stream()));
    return {logp, entropy, statistics};
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels, const Tensor& statistics,
                               const Tensor& entropy, const std::optional<Tensor>& grad_logp,
                               const std::optional<Tensor>& grad_entropy, double temperature,
                               std::optional<int64_t> ignore_index) {
    const Device device(logits);
    const Rows rows(logits, labels, temperature, ignore_index);
    const Tensor row_statistics = dense(statistics), row_entropy = dense(entropy);
    const std::optional<Tensor> row_grad_logp = dense(grad_logp), row_grad_entropy = dense(grad_entropy);
    Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
    STD_CUDA_CHECK(rlhf::token_logprobs_backward(
        rows.view, row_statistics.const_data_ptr<float>(), row_entropy.const_data_ptr<float>(),
        data_or_null<float>(row_grad_logp), data_or_null<float>(row_grad_entropy), grad_logits.mutable_data_ptr(),
        device.stream()));
    return grad_logits;
}

template <typename real>
void run_gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bootstrap,
             const std::optional<Tensor>& gammas, const std::optional<Tensor>& lams, double gamma, double lam,
             Tensor& advantages, Tensor& returns, cudaStream_t stream) {
    const rlhf::gae_batch<real> batch = {rewards.const_data_ptr<real>(),
                                         values.const_data_ptr<real>(),
                                         mask_data(mask),
                                         data_or_null<real>(bootstrap),
                                         data_or_null<real>(gammas),
                                         data_or_null<real>(lams),
                                         gamma,
                                         lam,
                                         rewards.size(0),
                                         rewards.size(1),
                                         advantages.mutable_data_ptr<real>(),
                                         returns.mutable_data_ptr<real>()};
    const Tensor scratch = scratch_memory(rewards, rlhf::gae_scratch_bytes(batch.rows, batch.tokens));
    STD_CUDA_CHECK(rlhf::gae(batch, scratch.mutable_data_ptr(), stream));
}

std::tuple<Tensor, Tensor> gae_per_token(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                                         const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& gammas,
                                         const std::optional<Tensor>& lams, double gamma, double lam) {
    const Device device(rewards);
    Tensor advantages = torch::stable::new_empty(rewards, rewards.sizes());
    Tensor returns = torch::stable::new_empty(rewards, rewards.sizes());
    const auto run = rewards.scalar_type() == ScalarType::Double ? run_gae<double> : run_gae<float>;
    run(dense(rewards), dense(values), dense(mask), dense(bootstrap), dense(gammas), dense(lams), gamma, lam, advantages,
        returns, device.stream());
    return {advantages, returns};
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                               const std::optional<Tensor>& bootstrap, double gamma, double lam) {
    return gae_per_token(rewards, values, mask, bootstrap, std::nullopt, std::nullopt, gamma, lam);
}

template <typename real>
void run_whiten(const Tensor& x, const Tensor& mask, bool shift_mean, Tensor& out, cudaStream_t stream) {
    const Tensor scratch = scratch_memory(x, rlhf::whiten_scratch_bytes(x.numel()));
    STD_CUDA_CHECK(rlhf::whiten(x.const_data_ptr<real>(), mask_data(mask), x.numel(), shift_mean, WHITEN_EPSILON,
                                scratch.mutable_data_ptr(), out.mutable_data_ptr<real>(), stream));
}

Tensor whiten(const Tensor& x, const Tensor& mask, bool shift_mean) {
    const Device device(x);
    Tensor out = torch::stable::new_empty(x, x.sizes());
    const auto run = x.scalar_type() == ScalarType::Double ? run_whiten<double> : run_whiten<float>;
    run(dense(x), dense(mask), shift_mean, out, device.stream());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) {
    m.impl("gae", TORCH_BOX(&gae));
    m.impl("gae_per_token", TORCH_BOX(&gae_per_token));
    m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
    m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
    m.impl("whiten", TORCH_BOX(&whiten));
}
