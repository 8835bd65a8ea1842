#include "noise_visible_patches/noise_visible_patches.h"

#include <cmath>

#include "common/simd.h"  // first: philox.h uses its multiply_low_words for vectors

#include "common/philox.h"

namespace maskdm::MASKDM_ISA {
namespace {

constexpr uint32_t kNoiseStream = 2;    // Stream.NOISE of maskdm_fast/random.py
constexpr int kBlocks = kLanes<float>;  // Philox blocks drawn together, one per lane

// sqrt(-2 ln u0) (cos, sin)(2 pi u1), one vector of floats at a time.
void box_muller(const float* u0, const float* u1, float* z0, float* z1) {
  for (int i = 0; i < kBlocks; i += kLanes<float>) {
    const vfloat radius = sqrt_of(-2.0f * log_of(load(u0 + i)));
    vfloat sine, cosine;
    sincos_2pi(load(u1 + i), sine, cosine);
    store(z0 + i, radius * cosine);
    store(z1 + i, radius * sine);
  }
}
void box_muller(const float* u0, const float* u1, double* z0, double* z1) {
  for (int i = 0; i < kBlocks; ++i) {
    const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(u0[i])));
    const double angle = 6.283185307179586 * static_cast<double>(u1[i]);
    z0[i] = radius * std::cos(angle);
    z1[i] = radius * std::sin(angle);
  }
}

// Normals of the blocks first .. first + kBlocks - 1 of one sample: out[4 i + j] is element 4 (first + i) + j.
template <class Acc>
void normals(uint32_t first, uint32_t slot, uint32_t step, uint64_t seed, Acc* out) {
  alignas(64) float u[4][kBlocks];
  for (int start = 0; start < kBlocks; start += kLanes<uint64_t>) {
    vulong counter[4] = {splat<uint64_t>(first + start), splat<uint64_t>(slot), splat<uint64_t>(step),
                         splat<uint64_t>(kNoiseStream)};
    for (int lane = 0; lane < kLanes<uint64_t>; ++lane) counter[0][lane] += lane;
    philox4x32(counter, seed);
    for (int j = 0; j < 4; ++j) {
      for (int lane = 0; lane < kLanes<uint64_t>; ++lane) {
        u[j][start + lane] = uniform_of(static_cast<uint32_t>(counter[j][lane]));
      }
    }
  }
  alignas(64) Acc z[4][kBlocks];
  box_muller(u[0], u[1], z[0], z[1]);
  box_muller(u[2], u[3], z[2], z[3]);
  for (int i = 0; i < kBlocks; ++i) {
    for (int j = 0; j < 4; ++j) out[4 * i + j] = z[j][i];
  }
}

template <class Pixel, class Acc>
MASKDM_INLINE Acc pixel_value(Pixel p) {
  if constexpr (sizeof(Pixel) == 1) {
    return static_cast<Acc>(p) / Acc(127.5) - Acc(1);
  } else {
    return static_cast<Acc>(to_acc(p));
  }
}

// Elements [0, size) of the patch at `corner`, in (py, px, channel) order.
template <class Pixel, class Acc>
void read_patch(const NoiseArgs& a, const Pixel* corner, int64_t step_x, Acc* x0) {
  for (int64_t y = 0; y < a.patch_size; ++y) {
    for (int64_t x = 0; x < a.patch_size; ++x) {
      const Pixel* pixel = corner + y * a.stride_y + x * step_x;
      for (int64_t c = 0; c < a.channels; ++c) *x0++ = pixel_value<Pixel, Acc>(pixel[c * a.stride_channel]);
    }
  }
}

int64_t patch_elements(const NoiseArgs& a) { return a.patch_size * a.patch_size * a.channels; }

// Normals that are held at once: the blocks of one patch, which may begin inside a block, in whole draws.
int64_t noise_elements(const NoiseArgs& a) {
  const int64_t blocks = (patch_elements(a) + 3) / 4 + 1;
  return (blocks + kBlocks - 1) / kBlocks * kBlocks * 4;
}

int64_t scratch_bytes(const NoiseArgs& a) { return (noise_elements(a) + patch_elements(a)) * 8; }

template <class Pixel, class Out>
void run_typed(const NoiseArgs& a, char* scratch, int64_t begin, int64_t end) {
  using Acc = accumulate_t<Out>;
  const int64_t size = patch_elements(a);
  Acc* noise = reinterpret_cast<Acc*>(scratch);
  Acc* x0 = noise + noise_elements(a);
  int64_t drawn_image = -1, drawn_first = 0, drawn_last = -1;  // which blocks `noise` holds, of which image
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.visible;
    const int64_t n = a.ids != nullptr ? a.ids[i] : i % a.visible;
    const bool flipped = a.flip != nullptr && a.flip[b];
    const int64_t row = n / a.patches_per_row, column = n % a.patches_per_row;
    const int64_t width = a.patches_per_row * a.patch_size;
    const int64_t left = flipped ? width - 1 - column * a.patch_size : column * a.patch_size;
    const Pixel* corner = reinterpret_cast<const Pixel*>(a.images) + b * a.stride_image +
                          row * a.patch_size * a.stride_y + left * a.stride_x;
    read_patch<Pixel, Acc>(a, corner, flipped ? -a.stride_x : a.stride_x, x0);

    const int64_t first_block = n * size / 4, last_block = ((n + 1) * size - 1) / 4;
    if (b != drawn_image || first_block < drawn_first || last_block > drawn_last) {
      int64_t block = first_block;
      for (; block <= last_block; block += kBlocks) {
        normals(static_cast<uint32_t>(block), static_cast<uint32_t>(a.slots[b]), static_cast<uint32_t>(a.step),
                static_cast<uint64_t>(a.seed), noise + (block - first_block) * 4);
      }
      drawn_image = b, drawn_first = first_block, drawn_last = block - 1;
    }
    const Acc* eps = noise + (n * size - drawn_first * 4);

    const Acc alpha = reinterpret_cast<const Acc*>(a.alpha)[b], sigma = reinterpret_cast<const Acc*>(a.sigma)[b];
    Out* xt = reinterpret_cast<Out*>(a.xt) + i * size;
    Out* target = reinterpret_cast<Out*>(a.target) + i * size;
    // The target as a combination of eps and x0, so that one loop serves every prediction.
    const Acc of_eps = a.prediction == 0 ? Acc(1) : a.prediction == 1 ? Acc(0) : alpha;
    const Acc of_x0 = a.prediction == 0 ? Acc(0) : a.prediction == 1 ? Acc(1) : -sigma;
    for (int64_t e = 0; e < size; ++e) {
      from_acc(alpha * x0[e] + sigma * eps[e], xt[e]);
      from_acc(of_eps * eps[e] + of_x0 * x0[e], target[e]);
    }
  }
}

void run(const NoiseArgs& a, char* scratch, int64_t begin, int64_t end) {
  dispatch_floating(a.out_dtype, [&](auto* out) {
    using Out = std::remove_pointer_t<decltype(out)>;
    if (a.image_dtype == DType::u8) {
      run_typed<uint8_t, Out>(a, scratch, begin, end);
    } else {
      dispatch_floating(a.image_dtype, [&](auto* pixel) {
        run_typed<std::remove_pointer_t<decltype(pixel)>, Out>(a, scratch, begin, end);
      });
    }
  });
}

}  // namespace

const NoiseKernels noise_visible_patches_kernels = {scratch_bytes, run};

}  // namespace maskdm::MASKDM_ISA
