// With Phi the standard normal distribution and phi its density:
//
//   out    = x Phi(x)
//   grad_x = grad (Phi(x) + x phi(x))
//
// Forward 1 read and 1 write per value, backward 2 reads and 1 write; one exponential and one division each, about 40 FLOPs.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace maskdm {

struct GeluArgs {
  DType dtype;
  const char* x;
  const char* grad;  // null in the forward pass
  char* out;
};

struct GeluKernels {
  void (*run)(const GeluArgs&, int64_t begin, int64_t end);
};

MASKDM_DECLARE_KERNELS(GeluKernels, gelu_kernels)

}  // namespace maskdm
