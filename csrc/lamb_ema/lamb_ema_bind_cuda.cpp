#include <memory>

#include "common/adam_bind.h"
#include "common/bind_cuda.h"
#include "lamb_ema/lamb_ema.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "lamb_ema";

void lamb_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas, Tensors copies,
               std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
               int64_t step, double ema_decay, int64_t min_ndim, std::optional<Tensor> lr_tensor,
               std::optional<Tensor> step_tensor, std::optional<Tensor> ema_decay_tensor,
               std::optional<Tensor> found_inf) {
  using torch::headeronly::ScalarType;
  const auto tensors = adam_cuda_tensors_of(kOp, Slots::all, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  const auto num_tensors = static_cast<int64_t>(tensors.size());
  const auto adapted = std::make_unique<bool[]>(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) adapted[i] = params[i].dim() >= min_ndim;
  const AdamArguments arguments{grad_scale,       lr,       beta1,     beta2,     eps,
                                weight_decay,     step,     ema_decay, lr_tensor, step_tensor,
                                ema_decay_tensor, found_inf};
  const CudaScope scope(params[0]);
  Tensor sums = torch::stable::new_empty(params[0], {lamb_parts(tensors.data(), num_tensors), 2}, ScalarType::Double);
  Tensor trust = torch::stable::new_empty(params[0], {num_tensors}, ScalarType::Float);
  lamb_ema_cuda(tensors.data(), adapted.get(), num_tensors, arguments.cuda_hyper(),
                reinterpret_cast<LambSums*>(mutable_bytes_of(sums)), reinterpret_cast<float*>(mutable_bytes_of(trust)),
                scope.stream());
}

}  // namespace
}  // namespace maskdm

MASKDM_CUDA_LIBRARY(m) { m.impl("lamb_ema_", TORCH_BOX(&maskdm::lamb_ema_)); }
