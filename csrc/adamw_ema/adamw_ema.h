// For every parameter, with g = grad_scale * grad, in the accumulation type:
//
//   param *= 1 - lr weight_decay
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   param -= step_size m / (sqrt(v) / bias2_sqrt + eps)      step_size = lr / (1 - beta1^step), bias2_sqrt = sqrt(1 - beta2^step)
//   ema   += (1 - ema_decay) (param - ema)
//   copy   = param, rounded to a 16-bit type                 where a copy is asked for
//
// One pass: 5 reads and 4 writes (or 5) per parameter. Without m, which takes beta1 = 0, m is g and not kept, and without
// ema there is no average: each is a read and a write less. Nothing of it happens where found_inf is given and not 0: the
// step of gradients that are not finite.
//
// sum_of_squares is the part of the gradients' norm: 1 read per value.
#pragma once

#include "common/adam.h"
#include "common/isa.h"

namespace maskdm {

struct AdamwEmaKernels {
  void (*run)(const AdamTensor&, const AdamHyper&, int64_t begin, int64_t end);
  double (*sum_of_squares)(DType, const char* values, int64_t begin, int64_t end);
};

MASKDM_DECLARE_KERNELS(AdamwEmaKernels, adamw_ema_kernels)

// No f64.
void adamw_ema_cuda(const AdamTensor* tensors, int64_t num_tensors, const AdamCudaHyper&, void* stream);

struct NormTensor {
  const char* values;
  int64_t count;
  DType dtype;
};

// `partial` is work memory of norm_parts() doubles; `norm` is one double or one float.
int64_t norm_parts(const NormTensor* tensors, int64_t num_tensors);
void global_norm_cuda(const NormTensor* tensors, int64_t num_tensors, double* partial, bool in_double, char* norm,
                      void* stream);

}  // namespace maskdm
