// What the bindings of adamw_ema and lamb_ema share: lists of tensors, and the numbers of a step.
#pragma once

#include <cmath>
#include <vector>

#include "common/adam.h"
#include "common/bind.h"

namespace maskdm {

using Tensors = std::vector<Tensor>;

enum class Kind { like_param, accumulator, sixteen_bit };

// That the tensors fit the parameters one by one. Python finds the words for a wrong one; looking at all of them there
// takes a quarter of the step of a small model.
inline void check_list(const char* op, const char* name, Kind kind, const Tensors& tensors, const Tensors& params) {
  using torch::headeronly::ScalarType;
  if (tensors.size() != params.size()) fail(op, ": ", name, " has ", tensors.size(), " tensors, want ", params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor &tensor = tensors[i], &param = params[i];
    const ScalarType have = tensor.scalar_type(), of_param = param.scalar_type();
    bool fits = tensor.is_contiguous() && tensor.dim() == param.dim();
    for (int64_t axis = 0; fits && axis < param.dim(); ++axis) fits = tensor.size(axis) == param.size(axis);
    switch (kind) {
      case Kind::like_param: fits = fits && have == of_param; break;
      case Kind::accumulator:
        fits = fits && have == (of_param == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
        break;
      case Kind::sixteen_bit: fits = fits && (have == ScalarType::Half || have == ScalarType::BFloat16); break;
    }
    if (!fits) fail(op, ": ", name, "[", i, "] does not fit params[", i, "]");
  }
}

// Kernels run on one device, and see no other device's memory.
inline void check_device(const char* op, const char* name, const Tensors& tensors, const Tensor& wanted) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].get_device_index() != wanted.get_device_index()) {
      fail(op, ": ", name, "[", i, "] is on device ", tensors[i].get_device_index(), ", want ",
           wanted.get_device_index());
    }
  }
}

// Whether an op takes empty lists for m and ema.
enum class Slots { all, some };

// Without a first moment the gradient takes its place, which is right for beta1 = 0 only.
inline void check_beta1(const char* op, const Tensors& exp_avgs, double beta1) {
  if (exp_avgs.empty() && beta1 != 0) fail(op, ": beta1 is ", beta1, ", want 0 where there are no exp_avgs");
}

// The lists as the kernels see them, checked.
inline std::vector<AdamTensor> adam_tensors_of(const char* op, Slots slots, const Tensors& params, const Tensors& grads,
                                               const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& emas,
                                               const Tensors& copies) {
  const bool has_m = slots == Slots::all || !exp_avgs.empty(), has_ema = slots == Slots::all || !emas.empty();
  check_list(op, "params", Kind::like_param, params, params);
  check_list(op, "grads", Kind::like_param, grads, params);
  if (has_m) check_list(op, "exp_avgs", Kind::accumulator, exp_avgs, params);
  check_list(op, "exp_avg_sqs", Kind::accumulator, exp_avg_sqs, params);
  if (has_ema) check_list(op, "emas", Kind::accumulator, emas, params);
  if (!copies.empty()) check_list(op, "copies", Kind::sixteen_bit, copies, params);
  std::vector<AdamTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    AdamTensor& t = tensors[i];
    t.dtype = dtype_of(op, params[i]), t.count = params[i].numel();
    t.param = mutable_bytes_of(params[i]), t.grad = bytes_of(grads[i]);
    t.v = mutable_bytes_of(exp_avg_sqs[i]);
    t.m = has_m ? mutable_bytes_of(exp_avgs[i]) : nullptr;
    t.ema = has_ema ? mutable_bytes_of(emas[i]) : nullptr;
    t.copy = copies.empty() ? nullptr : mutable_bytes_of(copies[i]);
    t.copy_dtype = copies.empty() ? DType::f32 : dtype_of(op, copies[i]);
  }
  return tensors;
}

// The same for CUDA kernels, which have no float64.
inline std::vector<AdamTensor> adam_cuda_tensors_of(const char* op, Slots slots, const Tensors& params,
                                                    const Tensors& grads, const Tensors& exp_avgs,
                                                    const Tensors& exp_avg_sqs, const Tensors& emas,
                                                    const Tensors& copies) {
  const auto tensors = adam_tensors_of(op, slots, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  check_device(op, "params", params, params.at(0));
  check_device(op, "grads", grads, params[0]);
  check_device(op, "exp_avgs", exp_avgs, params[0]);
  check_device(op, "exp_avg_sqs", exp_avg_sqs, params[0]);
  check_device(op, "emas", emas, params[0]);
  check_device(op, "copies", copies, params[0]);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].dtype == DType::f64) fail(op, ": the CUDA kernel has no float64, the dtype of params[", i, "]");
  }
  return tensors;
}

// What the schemas of both call the step, with its numbers in memory or not.
struct AdamArguments {
  std::optional<Tensor> grad_scale;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
  double ema_decay;
  std::optional<Tensor> lr_tensor, step_tensor, ema_decay_tensor, found_inf;

  // For tensors on the CPU, whose values are at hand.
  bool skipped() const { return found_inf.has_value() && *data_of<float>(found_inf) != 0; }
  AdamHyper hyper() const {
    const auto steps = static_cast<double>(step_tensor.has_value() ? *data_of<int64_t>(step_tensor) : step);
    return {lr_tensor.has_value() ? *data_of<float>(lr_tensor) : lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            ema_decay_tensor.has_value() ? *data_of<double>(ema_decay_tensor) : ema_decay,
            1 - std::pow(beta1, steps),
            std::sqrt(1 - std::pow(beta2, steps)),
            grad_scale.has_value() ? *data_of<float>(grad_scale) : 1};
  }

  // For tensors on a GPU, which reads them.
  AdamCudaHyper cuda_hyper() const {
    return {lr,
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
  }
};

// A part of one tensor of a list.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

constexpr int64_t kAdamChunk = 1 << 15;  // parameters per unit of work: large tensors are shared between threads

inline std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t count = tensors[i].numel();
    for (int64_t begin = 0; begin < count; begin += kAdamChunk)
      chunks.push_back({i, begin, std::min(begin + kAdamChunk, count)});
  }
  return chunks;
}

}  // namespace maskdm
