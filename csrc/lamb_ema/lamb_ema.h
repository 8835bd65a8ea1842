// For every tensor of parameters, with g = grad_scale * grad, in the accumulation type:
//
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   r = m_hat / (sqrt(v_hat) + eps) + weight_decay param      m_hat = m / (1 - beta1^step), v_hat alike
//   trust = |param| / |r|                                     L2 norms of the tensor; 1 where either is 0
//   param -= lr trust r
//   ema   += (1 - ema_decay) (param - ema)
//   copy   = param, rounded to a 16-bit type                  where a copy is asked for
//
// trust is 1 as well for a tensor that is not to be adapted. Nothing of it happens where found_inf is given and not 0.
//
// Two passes, for the norms take in the whole tensor before its first parameter may change: the first reads param, grad,
// m and v, and writes m and v and the sums of squares; the second reads param, m, v and ema, computes r once more, and
// writes param and ema (and copy). 8 reads and 4 writes (or 5) per parameter.
#pragma once

#include <cmath>

#include "common/adam.h"
#include "common/isa.h"

namespace maskdm {

// Sums of the squares of param and r.
struct LambSums {
  double param, update;
};

MASKDM_HOST_DEVICE inline double lamb_trust(LambSums sums, bool adapted) {
  return !adapted || sums.param == 0 || sums.update == 0 ? 1 : sqrt(sums.param) / sqrt(sums.update);
}

struct LambEmaKernels {
  LambSums (*update_moments)(const AdamTensor&, const AdamHyper&, int64_t begin, int64_t end);
  void (*apply)(const AdamTensor&, const AdamHyper&, double trust, int64_t begin, int64_t end);
};

MASKDM_DECLARE_KERNELS(LambEmaKernels, lamb_ema_kernels)

// No f64. `adapted` says of each tensor whether it is; `sums` is work memory of lamb_parts(), `trust` of num_tensors.
int64_t lamb_parts(const AdamTensor* tensors, int64_t num_tensors);
void lamb_ema_cuda(const AdamTensor* tensors, const bool* adapted, int64_t num_tensors, const AdamCudaHyper&,
                   LambSums* sums, float* trust, void* stream);

}  // namespace maskdm
