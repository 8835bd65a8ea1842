#include "adamw_ema/adamw_ema_bind.h"
#include "common/bind_cuda.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "adamw_ema";

// Kernels run on one device, and see no other device's memory.
void check_device(const char* op, const char* name, const Tensors& tensors, const Tensor& wanted) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].get_device_index() != wanted.get_device_index()) {
      fail(op, ": ", name, "[", i, "] is on device ", tensors[i].get_device_index(), ", want ",
           wanted.get_device_index());
    }
  }
}

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
  check_lists(kOp, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  check_device(kOp, "params", params, params.at(0));
  check_device(kOp, "grads", grads, params[0]);
  check_device(kOp, "exp_avgs", exp_avgs, params[0]);
  check_device(kOp, "exp_avg_sqs", exp_avg_sqs, params[0]);
  check_device(kOp, "emas", emas, params[0]);
  check_device(kOp, "copies", copies, params[0]);
  std::vector<AdamTensor> tensors;
  std::vector<int64_t> counts;
  for (size_t i = 0; i < params.size(); ++i) {
    tensors.push_back(adam_tensor_of(kOp, params, grads, exp_avgs, exp_avg_sqs, emas, copies, i));
    if (tensors[i].dtype == DType::f64) fail(kOp, ": the CUDA kernel has no float64, the dtype of params[", i, "]");
    counts.push_back(params[i].numel());
  }
  const AdamCudaHyper hyper{lr,
                            beta1,
                            beta2,
                            eps,
                            weight_decay,
                            ema_decay,
                            step,
                            data_of<float>(grad_scale),
                            data_of<float>(lr_tensor),
                            data_of<int64_t>(step_tensor),
                            data_of<double>(ema_decay_tensor),
                            data_of<float>(found_inf)};
  const CudaScope scope(params[0]);
  adamw_ema_cuda(tensors.data(), counts.data(), static_cast<int64_t>(tensors.size()), hyper, scope.stream());
}

}  // namespace
}  // namespace maskdm

MASKDM_CUDA_LIBRARY(m) {
  m.impl("adamw_ema_", TORCH_BOX(&maskdm::adamw_ema_));
  m.impl("global_norm", TORCH_BOX(&maskdm::global_norm));
}
