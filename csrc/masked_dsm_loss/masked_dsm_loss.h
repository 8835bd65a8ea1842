// For image b with M values (visible tokens times values per token) and d = pred - target:
//
//   raw[b] = 1/M sum f(d),          f = d^2 (mse), |d| (l1), d^2/2 or delta (|d| - delta/2) (huber)
//   grad   = scale[b] f'(d)         the gradient to pred, where scale[b] is 1/M times all that raw[b] was multiplied by
//
// Each is one pass: value 2 reads per value, gradient 2 reads and 1 write. An image without values has raw 0.
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
  const char* pred;     // [T, width]
  const char* target;   // [T, width]
  double* raw;          // [B]: written by value
  const double* scale;  // [B]: read by gradient
  char* grad;           // [T, width]: written by gradient
};

struct MaskedDsmLossKernels {
  void (*value)(const LossArgs&, int64_t image_begin, int64_t image_end);
  void (*gradient)(const LossArgs&, int64_t image_begin, int64_t image_end);
};

MASKDM_DECLARE_KERNELS(MaskedDsmLossKernels, masked_dsm_loss_kernels)

}  // namespace maskdm
