// For every parameter, with g = grad_scale * grad, in the accumulation type:
//
//   param *= 1 - lr weight_decay
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   param -= step_size m / (sqrt(v) / bias2_sqrt + eps)      step_size = lr / (1 - beta1^step), bias2_sqrt = sqrt(1 - beta2^step)
//   ema   += (1 - ema_decay) (param - ema)
//   copy   = param, rounded to a 16-bit type                 where a copy is asked for
//
// One pass: 5 reads and 4 writes (or 5) per parameter. Nothing of it happens where found_inf is given and not 0: the
// step of gradients that are not finite.
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

// On a GPU pointers are to its memory. Where lr_tensor, step_tensor or ema_decay_tensor is given, the number that it
// points to counts instead of the one above.
struct AdamCudaHyper {
  double lr, beta1, beta2, eps, weight_decay, ema_decay;
  int64_t step;
  const float* grad_scale;  // or null: 1
  const float* lr_tensor;
  const int64_t* step_tensor;
  const double* ema_decay_tensor;
  const float* found_inf;  // or null: 0
};

// No f64; counts[i] is the number of parameters of tensors[i].
void adamw_ema_cuda(const AdamTensor* tensors, const int64_t* counts, int64_t num_tensors, const AdamCudaHyper&,
                    void* stream);

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
