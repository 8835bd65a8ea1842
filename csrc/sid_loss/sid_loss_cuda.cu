// The formulas of sid_loss.h, three launches for forward and backward:
//
//   sums:       one block takes chunks of 1024 values of one image and writes the two sums over them
//   finish:     one warp adds the sums of one image and writes its loss and its scale; for the mean over images one block
//               does that for all of them and adds up the losses
//   gradients:  one block takes chunks again and writes the gradients that are wanted
//
// A thread reads 16 bytes of each tensor at a time; the 4 or 8 values of one access are added in float, everything else
// in double. Every sum is a tree of fixed shape, without atomics, so it repeats bit for bit. Where images or tensors do
// not begin on a boundary of 16 bytes, common/value_parts.h says what goes one by one.
//
// Bytes, float32: 12 a value forward (16 with xt) and 24 backward, 32 more for every 1024 values. About 7 FLOPs a value
// forward and 14 backward.
//
// Must hold: all tensors are contiguous; fewer than 2^31 blocks.
#include "sid_loss/sid_loss.h"

#include "common/block_sum.h"
#include "common/cuda.h"
#include "common/value_parts.h"

namespace maskdm {
namespace {

using MASKDM_ISA::from_acc;
using MASKDM_ISA::sid_loss_of;

constexpr int kThreads = 128;
constexpr int kChunk = 1024;  // values of each tensor that the threads of a block hold at one time
constexpr int kMeanThreads = 1024;
constexpr int kImagesPerBlock = kThreads / 32;

struct ForwardLaunch {
  SidForwardCuda args;
  float alpha;
  uint32_t parts;  // blocks per image
};

struct BackwardLaunch {
  SidBackwardCuda args;
  struct {
    float of_e, of_d;
  } slope[3];
  uint32_t parts;
};

// One block per (image, part): partial[image, part] = the sums over its chunks.
template <class T, int N, bool kOfXt>
__global__ void __launch_bounds__(kThreads) sid_sums_kernel(ForwardLaunch launch) {
  const SidForwardCuda& a = launch.args;
  const int64_t image = blockIdx.x / launch.parts, begin = image * a.images.count;
  const float inverse = kOfXt && a.alpha_t != nullptr ? 1.0f / a.alpha_t[image] : 1.0f;
  double value = 0, size = 0;
  const auto add = [&]<int kInputs, int M>(int64_t, const float (&values)[kInputs][M]) {
    float v[M], s[M];
#pragma unroll
    for (int j = 0; j < M; ++j) {
      const float d = values[1][j] - values[2][j], e = values[1][j] - values[0][j];
      v[j] = d * (e - launch.alpha * d);
      s[j] = fabsf(kOfXt ? values[1][j] - inverse * values[kInputs - 1][j] : e);
    }
    value += static_cast<double>(tree_sum(v));
    size += static_cast<double>(tree_sum(s));
  };
  const auto through = [&](const auto& inputs) {
    for_each_values<kThreads, kChunk, N>(inputs, begin, begin + a.images.count, blockIdx.x % launch.parts, launch.parts,
                                         add);
  };
  const T* generated = reinterpret_cast<const T*>(a.images.generated);
  const T* teacher = reinterpret_cast<const T*>(a.images.teacher);
  const T* fake = reinterpret_cast<const T*>(a.images.fake);
  if constexpr (kOfXt) {
    const T* const inputs[4] = {generated, teacher, fake, reinterpret_cast<const T*>(a.xt)};
    through(inputs);
  } else {
    const T* const inputs[3] = {generated, teacher, fake};
    through(inputs);
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  value = block_sum(value, shared);
  __syncthreads();
  size = block_sum(size, shared);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = {value, size};
}

// One warp: the loss of `image` on every lane; writes its scale. All lanes must come.
__device__ double finish_image(const ForwardLaunch& launch, int64_t image) {
  const SidForwardCuda& a = launch.args;
  SidSums sums{};
  for (uint32_t part = threadIdx.x % 32; part < launch.parts; part += 32) {
    const SidSums of_part = a.partial[image * launch.parts + part];
    sums.value += of_part.value;
    sums.size += of_part.size;
  }
  sums.value = warp_sum(sums.value);
  sums.size = warp_sum(sums.size);
  const double weight = a.weight != nullptr ? static_cast<double>(a.weight[image]) : 1.0;
  const SidLoss result = sid_loss_of(sums, static_cast<double>(a.images.count), weight, a.normalised);
  if (threadIdx.x % 32 == 0) a.scale[image] = static_cast<float>(result.scale);
  return result.loss;
}

// One warp per image: its loss and its scale.
__global__ void __launch_bounds__(kThreads) sid_images_kernel(ForwardLaunch launch) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kImagesPerBlock + threadIdx.x / 32;
  if (image >= launch.args.images.num_images) return;
  const double loss = finish_image(launch, image);
  if (threadIdx.x % 32 == 0) launch.args.loss[image] = static_cast<float>(loss);
}

// One block: the scales of all images and the mean of their losses.
__global__ void __launch_bounds__(kMeanThreads) sid_mean_kernel(ForwardLaunch launch) {
  const int64_t num_images = launch.args.images.num_images;
  double sum = 0;
  for (int64_t image = threadIdx.x / 32; image < num_images; image += kMeanThreads / 32) {
    const double loss = finish_image(launch, image);
    if (threadIdx.x % 32 == 0) sum += loss;
  }
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) launch.args.loss[0] = static_cast<float>(sum / static_cast<double>(num_images));
}

// One block per (image, part): the gradients of its chunks, 0 where the scale is.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) sid_gradients_kernel(BackwardLaunch launch) {
  const SidBackwardCuda& a = launch.args;
  const int64_t image = blockIdx.x / launch.parts, begin = image * a.images.count;
  const float scale = a.scale[image];
  const double shares = static_cast<double>(a.images.count * (a.mean ? a.images.num_images : 1));
  const double upstream = static_cast<double>(a.grad_loss[image * a.grad_loss_stride]);
  const float factor = static_cast<float>(upstream * static_cast<double>(scale) / shares);
  const T* const inputs[3] = {reinterpret_cast<const T*>(a.images.generated),
                              reinterpret_cast<const T*>(a.images.teacher), reinterpret_cast<const T*>(a.images.fake)};
  const auto write = [&]<int M>(int64_t i, const float (&values)[3][M]) {
    float d[M], e[M];
#pragma unroll
    for (int j = 0; j < M; ++j) {
      d[j] = scale != 0.0f ? values[1][j] - values[2][j] : 0.0f;
      e[j] = scale != 0.0f ? values[1][j] - values[0][j] : 0.0f;
    }
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      T* grad = reinterpret_cast<T*>(a.grads.to[which]);
      if (grad == nullptr) continue;
      Pack<T, M> g;
#pragma unroll
      for (int j = 0; j < M; ++j) {
        const float slope = launch.slope[which].of_e * e[j] + launch.slope[which].of_d * d[j];
        from_acc(scale != 0.0f ? factor * slope : 0.0f, g.values[j]);
      }
      store_pack(grad + i, g);
    }
  };
  for_each_values<kThreads, kChunk, N>(inputs, begin, begin + a.images.count, blockIdx.x % launch.parts, launch.parts,
                                       write);
}

uint32_t parts_of_image(const SidImages& images) {
  return parts_of(images.num_images, images.num_images * images.count, kChunk);
}

bool inputs_are_aligned(const SidImages& images) {
  return is_aligned(images.generated, 16) && is_aligned(images.teacher, 16) && is_aligned(images.fake, 16);
}

}  // namespace

int64_t sid_parts(const SidImages& images) { return images.num_images * parts_of_image(images); }

void sid_loss_forward_cuda(const SidForwardCuda& args, void* stream) {
  const ForwardLaunch arguments{args, static_cast<float>(args.images.alpha), parts_of_image(args.images)};
  const uint32_t num_images = static_cast<uint32_t>(args.images.num_images);
  const bool aligned = inputs_are_aligned(args.images) && is_aligned(args.xt, 16);
  constexpr int64_t kSumBytes = kThreads / 32 * sizeof(double);
  if (num_images > 0) {
    const Dim3 grid{num_images * arguments.parts};
    dispatch_accesses("sid_loss", args.images.dtype, aligned, [&]<class T, int N>(T*, std::integral_constant<int, N>) {
      const auto kernel = args.xt != nullptr ? sid_sums_kernel<T, N, true> : sid_sums_kernel<T, N, false>;
      launch(kernel, grid, Dim3{kThreads}, kSumBytes, stream, arguments);
    });
  }
  if (args.mean) {
    launch(sid_mean_kernel, Dim3{1}, Dim3{kMeanThreads}, kMeanThreads / 32 * sizeof(double), stream, arguments);
  } else if (num_images > 0) {
    launch(sid_images_kernel, Dim3{static_cast<uint32_t>(divide_up(num_images, kImagesPerBlock))}, Dim3{kThreads}, 0,
           stream, arguments);
  }
}

void sid_loss_backward_cuda(const SidBackwardCuda& args, void* stream) {
  if (args.images.num_images == 0) return;
  BackwardLaunch arguments{args, {}, parts_of_image(args.images)};
  bool aligned = inputs_are_aligned(args.images);
  for (int which = 0; which < 3; ++which) {
    const SidSlope slope = sid_slope(which, args.images.alpha);
    arguments.slope[which] = {static_cast<float>(slope.of_e), static_cast<float>(slope.of_d)};
    aligned = aligned && is_aligned(args.grads.to[which], 16);
  }
  const Dim3 grid{static_cast<uint32_t>(args.images.num_images) * arguments.parts};
  dispatch_accesses("sid_loss", args.images.dtype, aligned, [&]<class T, int N>(T*, std::integral_constant<int, N>) {
    launch(sid_gradients_kernel<T, N>, grid, Dim3{kThreads}, 0, stream, arguments);
  });
}

}  // namespace maskdm
