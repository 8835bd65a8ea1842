// For every parameter, with g = grad_scale * grad, in the accumulation type:
//
//   param *= 1 - lr weight_decay
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   param -= step_size m / (sqrt(v) / bias2_sqrt + eps)      step_size = lr / (1 - beta1^step), bias2_sqrt = sqrt(1 - beta2^step)
//   ema   += (1 - ema_decay) (param - ema)
//   copy   = param, rounded to a 16-bit type                 where a copy is asked for
//
// One pass: 5 reads and 4 writes (or 5) per parameter.
//
// sum_of_squares is the part of the gradients' norm: 1 read per value.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace maskdm {

struct AdamTensor {
  DType dtype;       // of param and grad; m, v and ema have its accumulation type
  DType copy_dtype;  // f16 or bf16, where copy is not null
  char *param, *m, *v, *ema, *copy;
  const char* grad;
};

struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay, ema_decay, step_size, bias2_sqrt, grad_scale;
};

struct AdamwEmaKernels {
  void (*run)(const AdamTensor&, const AdamHyper&, int64_t begin, int64_t end);
  double (*sum_of_squares)(DType, const char* values, int64_t begin, int64_t end);
};

MASKDM_DECLARE_KERNELS(AdamwEmaKernels, adamw_ema_kernels)

}  // namespace maskdm
