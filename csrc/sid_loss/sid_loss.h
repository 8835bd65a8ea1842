// For image b with M values, d = teacher - fake, e = teacher - generated and a = alpha:
//
//   value = sum d (e - a d),    size = sum |teacher - anchor|,   anchor = generated, or xt / alpha_t
//   scale[b] = weight / max(1e-5, size / M), or weight where it is not normalised; 0 where a sum is not finite
//   loss[b] = scale[b] value / M
//   grad   = factor[b] (p e + q d),   p, q = 0, -1 to generated; 1, 1 - 2a to teacher; -1, 2a to fake
//
// where factor[b] is scale[b] times the upstream gradient, over M, and over B for the mean. Each is one pass: the sums 3
// reads per value, or 4 with xt; the gradients 3 reads and a write for each that is wanted.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace maskdm {

struct SidSums {
  double value, size;
};

// What both passes read, [B, M] each, and alpha.
struct SidImages {
  DType dtype;
  int64_t num_images, count;  // B, M
  double alpha;
  const char *generated, *teacher, *fake;
};

struct SidGradients {
  char* to[3];  // generated, teacher, fake: [B, M], or null where it is not wanted
};

struct SidSlope {
  double of_e, of_d;
};

// The gradient to one of SidGradients is factor (of_e e + of_d d).
inline SidSlope sid_slope(int which, double alpha) {
  if (which == 0) return {0.0, -1.0};
  return which == 1 ? SidSlope{1.0, 1.0 - 2.0 * alpha} : SidSlope{-1.0, 2.0 * alpha};
}

struct SidLoss {
  double loss, scale;
};

namespace MASKDM_ISA {

// Loss and scale of an image of `count` values.
MASKDM_HOST_DEVICE inline SidLoss sid_loss_of(const SidSums& sums, double count, double weight, bool normalised) {
  const double mean = normalised ? sums.size / count : 1.0;
  const double size = mean < 1e-5 ? 1e-5 : mean;  // NaN stays
  const bool finite = sums.value - sums.value == 0.0 && size - size == 0.0;
  if (!finite) return {0.0, 0.0};
  return {weight / size * (sums.value / count), weight / size};
}

}  // namespace MASKDM_ISA

struct SidKernels {
  // sums[b] for image_begin <= b < image_end. xt and inverse_alpha_t [B] may be null.
  void (*sums)(const SidImages&, const char* xt, const double* inverse_alpha_t, SidSums* sums, int64_t image_begin,
               int64_t image_end);
  // The gradients of those images, 0 where factor[b] is.
  void (*gradients)(const SidImages&, const double* factor, const SidGradients&, int64_t image_begin,
                    int64_t image_end);
};

MASKDM_DECLARE_KERNELS(SidKernels, sid_loss_kernels)

// On a GPU all pointers are to its memory.
struct SidForwardCuda {
  SidImages images;               // f32, f16 or bf16
  const char* xt;                 // [B, M], or null
  const float *alpha_t, *weight;  // [B], or null: 1
  bool normalised, mean;
  SidSums* partial;  // [sid_parts]: work memory
  float* loss;       // [] with mean, else [B]
  float* scale;      // [B]
};

struct SidBackwardCuda {
  SidImages images;
  const float* grad_loss;  // [] with mean, else [B] with a stride
  int64_t grad_loss_stride;
  const float* scale;  // [B]
  bool mean;
  SidGradients grads;
};

int64_t sid_parts(const SidImages&);
void sid_loss_forward_cuda(const SidForwardCuda&, void* stream);
void sid_loss_backward_cuda(const SidBackwardCuda&, void* stream);

}  // namespace maskdm
