#include "adamw_ema/adamw_ema.h"
#include "common/adam_bind.h"
#include "common/bind_cuda.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "adamw_ema";

// The L2 norm of all values of contiguous tensors, [] in float64 if one of them is, else in float32
Tensor global_norm(Tensors tensors) {
  using torch::headeronly::ScalarType;
  check_device("global_norm", "tensors", tensors, tensors.at(0));
  std::vector<NormTensor> items;
  bool in_double = false;
  for (const Tensor& tensor : tensors) {
    items.push_back({bytes_of(tensor), tensor.numel(), dtype_of("global_norm", tensor)});
    in_double = in_double || items.back().dtype == DType::f64;
  }
  const auto num_tensors = static_cast<int64_t>(items.size());
  const CudaScope scope(tensors[0]);
  Tensor partial = torch::stable::new_empty(tensors[0], {norm_parts(items.data(), num_tensors)}, ScalarType::Double);
  Tensor norm = torch::stable::new_empty(tensors[0], {}, in_double ? ScalarType::Double : ScalarType::Float);
  global_norm_cuda(items.data(), num_tensors, reinterpret_cast<double*>(mutable_bytes_of(partial)), in_double,
                   mutable_bytes_of(norm), scope.stream());
  return norm;
}

void adamw_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas, Tensors copies,
                std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double ema_decay, std::optional<Tensor> lr_tensor,
                std::optional<Tensor> step_tensor, std::optional<Tensor> ema_decay_tensor,
                std::optional<Tensor> found_inf) {
  check_beta1(kOp, exp_avgs, beta1);
  const auto tensors = adam_cuda_tensors_of(kOp, Slots::some, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  const AdamArguments arguments{grad_scale,       lr,       beta1,     beta2,     eps,
                                weight_decay,     step,     ema_decay, lr_tensor, step_tensor,
                                ema_decay_tensor, found_inf};
  const CudaScope scope(params[0]);
  adamw_ema_cuda(tensors.data(), static_cast<int64_t>(tensors.size()), arguments.cuda_hyper(), scope.stream());
}

}  // namespace
}  // namespace maskdm

MASKDM_CUDA_LIBRARY(m) {
  m.impl("adamw_ema_", TORCH_BOX(&maskdm::adamw_ema_));
  m.impl("global_norm", TORCH_BOX(&maskdm::global_norm));
}
