// For image b with M values (visible tokens times values per token) and d = pred - target:
//
//   raw[b]  = 1/M sum f(d),          f = d^2 (mse), |d| (l1), d^2/2 or delta (|d| - delta/2) (huber)
//   grad    = weight[b] / M f'(d)    the gradient of weight[b] raw[b] with respect to pred
//
// One pass: 2 reads and 1 write per value; without grad, 2 reads. An image without values has raw 0.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/segments.h"

namespace maskdm {

struct LossArgs {
  DType dtype;
  Segments segments;
  int64_t width;  // values per token
  int kind;       // 0 mse, 1 l1, 2 huber
  double delta;
  const char* pred;    // [T, width]
  const char* target;  // [T, width]
  const char* weight;  // [B] in the accumulation type, or null
  char* raw;           // [B] in the accumulation type
  char* grad;          // [T, width], or null
};

struct MaskedDsmLossKernels {
  void (*run)(const LossArgs&, int64_t image_begin, int64_t image_end);
};

MASKDM_DECLARE_KERNELS(MaskedDsmLossKernels, masked_dsm_loss_kernels)

}  // namespace maskdm
