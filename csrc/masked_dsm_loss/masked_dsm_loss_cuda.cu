// For image b with M values and d = pred - target:
//
//   loss[b] = weight[b] / M sum f(d), or the mean of them over images;    grad = scale[b] f'(d)
//
// The three kinds of f are one formula, so that no kernel branches on them: with size = |d|,
//
//   f(d) = slope (size - offset) where size > bend, else quadratic d^2;    f'(d) = +-slope, or 2 quadratic d
//
// Values: an image is shared by `parts` blocks, which take its chunks of 2048 values in turns. A thread reads 16 bytes
// of pred and of target at a time, adds up the f of those 4 or 8 values in float and the rest in double; a block writes
// one double. Values before the first and after the last multiple of 16 bytes go one by one. A second kernel adds the
// blocks' sums: a warp for each image, or one block for the mean of all. Every sum is a tree of fixed shape, without
// atomics, so it repeats bit for bit. The gradient has the same grid and no second kernel.
//
// Bytes, float32: 8 per value forward, 12 backward; 8 more for every 2048 values. About 5 FLOPs a value.
//
// Must hold: pred and target are contiguous; cu_seqlens rises from 0 to T; fewer than 2^31 blocks.
#include <limits>

#include "common/block_sum.h"
#include "common/cuda.h"
#include "common/value_parts.h"
#include "masked_dsm_loss/masked_dsm_loss.h"

namespace maskdm {
namespace {

using MASKDM_ISA::from_acc;
using MASKDM_ISA::segment_begin;

constexpr int kThreads = 128;
constexpr int kChunk = 2048;  // values that the threads of a block hold at one time
constexpr int kMeanThreads = 1024;
constexpr int kImagesPerBlock = kThreads / 32;

struct Curve {
  float bend, slope, offset, quadratic;

  __device__ float value(float d) const {
    const float size = fabsf(d);
    return size > bend ? slope * (size - offset) : quadratic * d * d;
  }
  // NaN at NaN; 0 at 0 also for l1, whose quadratic is 0.
  __device__ float derivative(float d) const { return fabsf(d) > bend ? copysignf(slope, d) : 2.0f * quadratic * d; }
};

Curve curve_of(int kind, float delta) {
  if (kind == 0) return {std::numeric_limits<float>::infinity(), 0.0f, 0.0f, 1.0f};
  if (kind == 1) return {0.0f, 1.0f, 0.0f, 0.0f};
  return {delta, delta, 0.5f * delta, 0.5f};
}

struct LossLaunch {
  LossCudaArgs args;
  Curve curve;
  uint32_t parts;  // blocks per image
};

// Where the values of an image begin; within the tensors, whatever cu_seqlens holds.
__device__ int64_t value_begin(const LossCudaArgs& a, int64_t image) {
  const int64_t token = segment_begin(a.segments, image);
  MASKDM_DEVICE_ASSERT(0 <= token && token <= a.num_tokens);
  return (token < 0 ? 0 : token > a.num_tokens ? a.num_tokens : token) * a.width;
}
__device__ int64_t count_of(const LossCudaArgs& a, int64_t image) {
  return value_begin(a, image + 1) - value_begin(a, image);
}
__device__ double weight_of(const LossCudaArgs& a, int64_t image) {
  return a.weight != nullptr ? static_cast<double>(a.weight[image]) : 1.0;
}
__device__ double at_least_one(int64_t count) { return static_cast<double>(count > 1 ? count : 1); }

// Calls on_values(i, d) for the differences of this block that begin at value i; d has N elements or one.
template <class T, int N, class OnValues>
__device__ void for_each_difference(const LossLaunch& launch, int64_t image, const OnValues& on_values) {
  const LossCudaArgs& a = launch.args;
  const T* const inputs[2] = {reinterpret_cast<const T*>(a.pred), reinterpret_cast<const T*>(a.target)};
  const auto on_both = [&]<int M>(int64_t i, const float (&values)[2][M]) {
    float d[M];
#pragma unroll
    for (int j = 0; j < M; ++j) d[j] = values[0][j] - values[1][j];
    on_values(i, d);
  };
  for_each_values<kThreads, kChunk, N>(inputs, value_begin(a, image), value_begin(a, image + 1),
                                       blockIdx.x % launch.parts, launch.parts, on_both);
}

// One block per (image, part): partial[image, part] = sum f(d) of its chunks.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) loss_value_kernel(LossLaunch launch) {
  double sum = 0;
  for_each_difference<T, N>(launch, blockIdx.x / launch.parts, [&]<int M>(int64_t, const float (&d)[M]) {
    float f[M];
#pragma unroll
    for (int j = 0; j < M; ++j) f[j] = launch.curve.value(d[j]);
    sum += static_cast<double>(tree_sum(f));
  });
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) launch.args.partial[blockIdx.x] = sum;
}

// One warp per image: loss[image] = weight / M sum over parts.
__global__ void __launch_bounds__(kThreads) loss_of_images_kernel(LossLaunch launch) {
  const LossCudaArgs& a = launch.args;
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kImagesPerBlock + threadIdx.x / 32;
  double sum = 0;
  if (image < a.segments.num_images) {
    for (uint32_t part = threadIdx.x % 32; part < launch.parts; part += 32) {
      sum += a.partial[image * launch.parts + part];
    }
  }
  sum = warp_sum(sum);
  if (image < a.segments.num_images && threadIdx.x % 32 == 0) {
    a.loss[image] = static_cast<float>(sum / at_least_one(count_of(a, image)) * weight_of(a, image));
  }
}

// One block: the mean over images of weight / M sum over parts.
__global__ void __launch_bounds__(kMeanThreads) loss_mean_kernel(LossLaunch launch) {
  const LossCudaArgs& a = launch.args;
  const uint32_t blocks = static_cast<uint32_t>(a.segments.num_images) * launch.parts;
  double sum = 0;
  for (uint32_t block = threadIdx.x; block < blocks; block += kMeanThreads) {
    const int64_t image = block / launch.parts;
    sum += a.partial[block] / at_least_one(count_of(a, image)) * weight_of(a, image);
  }
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) a.loss[0] = static_cast<float>(sum / static_cast<double>(a.segments.num_images));
}

// One block per (image, part): grad = scale f'(d) on its chunks.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) loss_gradient_kernel(LossLaunch launch) {
  const LossCudaArgs& a = launch.args;
  const int64_t image = blockIdx.x / launch.parts;
  const double shares = at_least_one(count_of(a, image)) * static_cast<double>(a.mean ? a.segments.num_images : 1);
  const double upstream = static_cast<double>(a.grad_loss[image * a.grad_loss_stride]);
  const float scale = static_cast<float>(upstream / shares * weight_of(a, image));
  T* __restrict__ grad = reinterpret_cast<T*>(a.grad);
  for_each_difference<T, N>(launch, image, [&]<int M>(int64_t i, const float (&d)[M]) {
    Pack<T, M> g;
#pragma unroll
    for (int j = 0; j < M; ++j) from_acc(scale * launch.curve.derivative(d[j]), g.values[j]);
    store_pack(grad + i, g);
  });
}

LossLaunch launch_of(const LossCudaArgs& args) {
  return {args, curve_of(args.kind, args.delta),
          parts_of(args.segments.num_images, args.num_tokens * args.width, kChunk)};
}

}  // namespace

int64_t loss_parts(const LossCudaArgs& args) { return args.segments.num_images * launch_of(args).parts; }

void masked_dsm_loss_forward_cuda(const LossCudaArgs& args, void* stream) {
  const LossLaunch arguments = launch_of(args);
  const uint32_t num_images = static_cast<uint32_t>(args.segments.num_images);
  const bool aligned = is_aligned(args.pred, 16) && is_aligned(args.target, 16);
  if (num_images > 0) {
    dispatch_accesses("masked_dsm_loss", args.dtype, aligned, [&]<class T, int N>(T*, std::integral_constant<int, N>) {
      launch(loss_value_kernel<T, N>, Dim3{num_images * arguments.parts}, Dim3{kThreads},
             kThreads / 32 * sizeof(double), stream, arguments);
    });
  }
  if (args.mean) {
    launch(loss_mean_kernel, Dim3{1}, Dim3{kMeanThreads}, kMeanThreads / 32 * sizeof(double), stream, arguments);
  } else if (num_images > 0) {
    launch(loss_of_images_kernel, Dim3{static_cast<uint32_t>(divide_up(num_images, kImagesPerBlock))}, Dim3{kThreads},
           0, stream, arguments);
  }
}

void masked_dsm_loss_backward_cuda(const LossCudaArgs& args, void* stream) {
  if (args.num_tokens * args.width == 0) return;
  const LossLaunch arguments = launch_of(args);
  const bool aligned = is_aligned(args.pred, 16) && is_aligned(args.target, 16) && is_aligned(args.grad, 16);
  dispatch_accesses("masked_dsm_loss", args.dtype, aligned, [&]<class T, int N>(T*, std::integral_constant<int, N>) {
    launch(loss_gradient_kernel<T, N>, Dim3{static_cast<uint32_t>(args.segments.num_images) * arguments.parts},
           Dim3{kThreads}, 0, stream, arguments);
  });
}

}  // namespace maskdm
