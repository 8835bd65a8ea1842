#include "adamw_ema/adamw_ema_bind.h"

#include <cmath>
#include <utility>
#include <vector>

#include "adamw_ema/schema.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "adamw_ema";
constexpr int64_t kChunk = 1 << 15;  // parameters per unit of work: large tensors are shared between threads

using torch::headeronly::ScalarType;

// A part of one tensor of a list.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t count = tensors[i].numel();
    for (int64_t begin = 0; begin < count; begin += kChunk)
      chunks.push_back({i, begin, std::min(begin + kChunk, count)});
  }
  return chunks;
}

// The L2 norm of all values of contiguous tensors, [] in float64 if one of them is, else in float32
Tensor global_norm(Tensors tensors) {
  const auto chunks = chunks_of(tensors);
  const auto& kernels = MASKDM_KERNELS(adamw_ema_kernels);
  std::vector<std::pair<DType, const char*>> values;
  bool in_double = false;
  for (const Tensor& tensor : tensors) {
    values.emplace_back(dtype_of(kOp, tensor), bytes_of(tensor));
    in_double = in_double || values.back().first == DType::f64;
  }
  std::vector<double> sums(chunks.size());
  parallel(static_cast<int64_t>(chunks.size()), kChunk * 0.1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [dtype, data] = values[chunks[i].tensor];
      sums[i] = kernels.sum_of_squares(dtype, data, chunks[i].begin, chunks[i].end);
    }
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  Tensor norm = torch::stable::new_empty(tensors.at(0), {}, in_double ? ScalarType::Double : ScalarType::Float);
  if (in_double) {
    *reinterpret_cast<double*>(mutable_bytes_of(norm)) = std::sqrt(sum);
  } else {
    *reinterpret_cast<float*>(mutable_bytes_of(norm)) = static_cast<float>(std::sqrt(sum));
  }
  return norm;
}

void adamw_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas, Tensors copies,
                std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double ema_decay, std::optional<Tensor> lr_tensor,
                std::optional<Tensor> step_tensor, std::optional<Tensor> ema_decay_tensor,
                std::optional<Tensor> found_inf) {
  check_lists(kOp, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  if (found_inf.has_value() && *data_of<float>(found_inf) != 0) return;
  if (lr_tensor.has_value()) lr = *data_of<float>(lr_tensor);
  if (step_tensor.has_value()) step = *data_of<int64_t>(step_tensor);
  if (ema_decay_tensor.has_value()) ema_decay = *data_of<double>(ema_decay_tensor);
  AdamHyper hyper{lr, beta1, beta2, eps, weight_decay, ema_decay, 0, 0, 1};
  hyper.step_size = lr / (1 - std::pow(beta1, static_cast<double>(step)));
  hyper.bias2_sqrt = std::sqrt(1 - std::pow(beta2, static_cast<double>(step)));
  if (grad_scale.has_value()) hyper.grad_scale = *data_of<float>(grad_scale);

  std::vector<AdamTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    tensors[i] = adam_tensor_of(kOp, params, grads, exp_avgs, exp_avg_sqs, emas, copies, i);
  }
  const auto chunks = chunks_of(params);
  const auto& kernels = MASKDM_KERNELS(adamw_ema_kernels);
  parallel(static_cast<int64_t>(chunks.size()), kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.run(tensors[chunks[i].tensor], hyper, chunks[i].begin, chunks[i].end);
  });
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(maskdm::kAdamwEmaSchema);
  m.def(maskdm::kGlobalNormSchema);
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("adamw_ema_", TORCH_BOX(&maskdm::adamw_ema_));
  m.impl("global_norm", TORCH_BOX(&maskdm::global_norm));
}
