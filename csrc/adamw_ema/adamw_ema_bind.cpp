#include <cmath>
#include <utility>
#include <vector>

#include "adamw_ema/adamw_ema.h"
#include "adamw_ema/schema.h"
#include "common/adam_bind.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "adamw_ema";

using torch::headeronly::ScalarType;

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
  parallel(static_cast<int64_t>(chunks.size()), kAdamChunk * 0.1, [&](int64_t begin, int64_t end) {
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
  check_beta1(kOp, exp_avgs, beta1);
  const auto tensors = adam_tensors_of(kOp, Slots::some, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  const AdamArguments arguments{grad_scale,       lr,       beta1,     beta2,     eps,
                                weight_decay,     step,     ema_decay, lr_tensor, step_tensor,
                                ema_decay_tensor, found_inf};
  if (arguments.skipped()) return;
  const AdamHyper hyper = arguments.hyper();
  const auto chunks = chunks_of(params);
  const auto& kernels = MASKDM_KERNELS(adamw_ema_kernels);
  parallel(static_cast<int64_t>(chunks.size()), kAdamChunk, [&](int64_t begin, int64_t end) {
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
