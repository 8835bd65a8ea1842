// For each visible patch n of image b, with x0 the pixels of the patch in [-1, 1], in the order (py, px, channel):
//
//   xt     = alpha[b] x0 + sigma[b] eps
//   target = eps_scale[b] eps + x0_scale[b] x0
//
// eps[e] is the standard normal of Philox counter (element // 4, slot, step, NOISE) with element = n P P C + e, by
// Box-Muller in float32 (in float64 where out_dtype is).
// uint8 pixels map by x0 = u / 127.5 - 1; floating-point ones are x0 already. A flipped image is read mirrored
// left-right; the noise belongs to the place in the mirrored image.
//
// Reads the visible pixels only, draws noise for them only; writes 2 values per visible pixel and channel. Patches are
// taken in batches: first the Philox blocks of the whole batch, of whatever images, one per vector lane, then the patches.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/segments.h"

namespace maskdm {

struct NoiseArgs {
  DType image_dtype;  // u8 or floating
  DType out_dtype;    // floating
  const char* images;
  int64_t stride_image, stride_channel, stride_y, stride_x;  // in elements
  int64_t channels, patch_size;
  int64_t patches_per_row;  // of the grid
  Segments segments;        // the visible patches of each image
  const int64_t* ids;       // [T], or null for all patches in order
  const char* alpha;        // [B], f32 (f64 where out_dtype is f64)
  const char* sigma;
  const char* eps_scale;
  const char* x0_scale;
  const int64_t* slots;  // [B]
  const bool* flip;      // [B], or null
  int64_t step, seed;
  char* xt;  // [T, P P C]
  char* target;
};

struct NoiseKernels {
  int64_t (*scratch_bytes)(const NoiseArgs&);
  // Visible patches [begin, end) of all T, in order.
  void (*run)(const NoiseArgs&, char* scratch, int64_t begin, int64_t end);
};

MASKDM_DECLARE_KERNELS(NoiseKernels, noise_visible_patches_kernels)

}  // namespace maskdm
