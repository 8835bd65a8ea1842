// What the steps of Adam's family share, adamw_ema and lamb_ema: their tensors, and the numbers of a step.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace maskdm {

// copy may be null, and for adamw_ema m and ema as well: what is not there.
struct AdamTensor {
  DType dtype;       // of param and grad; m, v and ema have its accumulation type
  DType copy_dtype;  // f16 or bf16, where copy is not null
  char *param, *m, *v, *ema, *copy;
  const char* grad;
  int64_t count;
};

struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay, ema_decay;
  double bias1, bias2_sqrt;  // 1 - beta1^step and sqrt(1 - beta2^step)
  double grad_scale;
};

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

namespace MASKDM_ISA {

// The numbers of a step in the type that it is computed in.
template <class A>
struct AdamNumbers {
  A lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, ema_rate, inverse_bias1, inverse_bias2,
      grad_scale;

  explicit AdamNumbers(const AdamHyper& h)
      : lr(A(h.lr)),
        beta1(A(h.beta1)),
        one_minus_beta1(A(1 - h.beta1)),
        beta2(A(h.beta2)),
        one_minus_beta2(A(1 - h.beta2)),
        eps(A(h.eps)),
        weight_decay(A(h.weight_decay)),
        ema_rate(A(1 - h.ema_decay)),
        inverse_bias1(A(1 / h.bias1)),
        inverse_bias2(A(1 / h.bias2_sqrt)),
        grad_scale(A(h.grad_scale)) {}
};

template <class T, class Copy>
void copy_typed(const T* param, char* copy, int64_t begin, int64_t end) {
  Copy* out = reinterpret_cast<Copy*>(copy);
  for (int64_t i = begin; i < end; ++i) from_acc(static_cast<float>(to_acc(param[i])), out[i]);
}

// Rounds parameters into the copy, where there is one.
template <class T>
void write_copy(const AdamTensor& t, const T* param, int64_t begin, int64_t end) {
  if (t.copy == nullptr) return;
  if (t.copy_dtype == DType::bf16) {
    copy_typed<T, bfloat16>(param, t.copy, begin, end);
  } else {
    copy_typed<T, half>(param, t.copy, begin, end);
  }
}

}  // namespace MASKDM_ISA
}  // namespace maskdm
