// The formulas of lamb_ema.h for lists of tensors, three launches for up to 52 of them: their addresses and sizes are in
// the 4 KiB of a kernel's arguments, as in adamw_ema_cuda.cu, whose accesses these are too.
//
//   moments: one block takes one chunk of 8192 parameters of one tensor, updates m and v there, and writes the sums of
//            squares of param and r over the chunk
//   trust:   one block adds the sums of one tensor and writes its trust ratio
//   apply:   one block takes one chunk again, computes r once more, and updates param, ema and copy
//
// Squares are added in float four at a time and then in double, as trees of fixed shape. lr, step, ema_decay, the
// clipping factor and found_inf may be in memory.
//
// Bytes, float32: 24 a parameter and pass, 48 together, 2 more with a 16-bit copy. About 35 FLOPs, with two divisions
// and two roots.
//
// Must hold: all tensors are contiguous and of the types of common/adam.h; a launch has fewer than 2^31 chunks; the
// squares of parameters are within the range of float.
#include "lamb_ema/lamb_ema.h"

#include "common/adam_cuda.h"
#include "common/block_sum.h"
#include "common/cuda.h"

namespace maskdm {
namespace {

using MASKDM_ISA::from_acc;
using MASKDM_ISA::to_acc;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;
constexpr int kTensors = 52;
constexpr int64_t kSumBytes = kThreads / 32 * sizeof(double);

struct LambTensor : AdamTensor {
  bool adapted;
};

struct LambLaunch {
  Batch<LambTensor, kTensors> batch;
  AdamScalars scalars;
  LambSums* sums;  // of the chunks
  float* trust;    // of the tensors
};
static_assert(sizeof(LambLaunch) <= kMaxArguments);

struct Update {
  AdamStep step;
  float inverse_bias1;

  __device__ explicit Update(const AdamScalars& scalars) : step(scalars), inverse_bias1(1.0f / step.bias1) {}

  __device__ float operator()(float param, float m, float v) const {
    return m * inverse_bias1 / (sqrtf(v) * step.inverse_bias2 + step.eps) + step.weight_decay * param;
  }
};

template <class T, int N>
__device__ void add_moments(const AdamTensor& t, const Update& update, int64_t begin, int64_t end, LambSums& sums) {
  float *m_at = reinterpret_cast<float*>(t.m), *v_at = reinterpret_cast<float*>(t.v);
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kThreads * N) {
    const auto param = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(t.param) + i);
    const auto grad = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(t.grad) + i);
    auto m = *reinterpret_cast<const Pack<float, N>*>(m_at + i);
    auto v = *reinterpret_cast<const Pack<float, N>*>(v_at + i);
    float of_param = 0, of_update = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float p = to_acc(param.values[j]);
      update.step.update_moments(to_acc(grad.values[j]), m.values[j], v.values[j]);
      const float r = update(p, m.values[j], v.values[j]);
      of_param += p * p;
      of_update += r * r;
    }
    store_pack(m_at + i, m);
    store_pack(v_at + i, v);
    sums.param += of_param;
    sums.update += of_update;
  }
}

template <class T>
__device__ LambSums moments_of_chunk(const AdamTensor& t, const Update& update, int64_t begin, int64_t end) {
  constexpr int N = 4;
  const int64_t last = is_aligned_for<T, N>(t) ? end / N * N : begin;
  LambSums sums{};
  add_moments<T, N>(t, update, begin, last, sums);
  add_moments<T, 1>(t, update, last, end, sums);
  return sums;
}

// One block: m and v of one chunk, and its sums.
__global__ void __launch_bounds__(kThreads) lamb_moments_kernel(LambLaunch launch) {
  if (launch.scalars.skipped()) return;
  const auto [tensor, begin, end, index] = launch.batch.part(blockIdx.x, kChunk);
  const Update update(launch.scalars);
  LambSums sums{};
  switch (tensor.dtype) {
    case DType::f32: sums = moments_of_chunk<float>(tensor, update, begin, end); break;
    case DType::f16: sums = moments_of_chunk<half>(tensor, update, begin, end); break;
    default: sums = moments_of_chunk<bfloat16>(tensor, update, begin, end); break;
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sums.param = block_sum(sums.param, shared);
  __syncthreads();
  sums.update = block_sum(sums.update, shared);
  if (threadIdx.x == 0) launch.sums[blockIdx.x] = sums;
}

// One block: the trust ratio of one tensor.
__global__ void __launch_bounds__(kThreads) lamb_trust_kernel(LambLaunch launch) {
  if (launch.scalars.skipped()) return;
  LambSums sums{};
  const uint32_t end = launch.batch.first_chunk[blockIdx.x + 1];
  for (uint32_t i = launch.batch.first_chunk[blockIdx.x] + threadIdx.x; i < end; i += kThreads) {
    sums.param += launch.sums[i].param;
    sums.update += launch.sums[i].update;
  }
  double* shared = reinterpret_cast<double*>(shared_memory());
  sums.param = block_sum(sums.param, shared);
  __syncthreads();
  sums.update = block_sum(sums.update, shared);
  const bool adapted = launch.batch.items[blockIdx.x].adapted;
  if (threadIdx.x == 0) launch.trust[blockIdx.x] = static_cast<float>(lamb_trust(sums, adapted));
}

template <class T, int N>
__device__ void apply_to_range(const AdamTensor& t, const Update& update, float rate, int64_t begin, int64_t end) {
  T* param_at = reinterpret_cast<T*>(t.param);
  float* ema_at = reinterpret_cast<float*>(t.ema);
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kThreads * N) {
    auto param = *reinterpret_cast<const Pack<T, N>*>(param_at + i);
    const auto m = *reinterpret_cast<const Pack<float, N>*>(reinterpret_cast<const float*>(t.m) + i);
    const auto v = *reinterpret_cast<const Pack<float, N>*>(reinterpret_cast<const float*>(t.v) + i);
    auto ema = *reinterpret_cast<const Pack<float, N>*>(ema_at + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float before = to_acc(param.values[j]);
      const float p = before - rate * update(before, m.values[j], v.values[j]);
      ema.values[j] += update.step.ema_rate * (p - ema.values[j]);
      from_acc(p, param.values[j]);
    }
    store_pack(param_at + i, param);
    store_pack(ema_at + i, ema);
    store_copy(t, i, param);
  }
}

template <class T>
__device__ void apply_to_chunk(const AdamTensor& t, const Update& update, float rate, int64_t begin, int64_t end) {
  constexpr int N = 4;
  const int64_t last = is_aligned_for<T, N>(t) ? end / N * N : begin;
  apply_to_range<T, N>(t, update, rate, begin, last);
  apply_to_range<T, 1>(t, update, rate, last, end);
}

// One block: param, ema and copy of one chunk.
__global__ void __launch_bounds__(kThreads) lamb_apply_kernel(LambLaunch launch) {
  if (launch.scalars.skipped()) return;
  const auto [tensor, begin, end, index] = launch.batch.part(blockIdx.x, kChunk);
  const Update update(launch.scalars);
  const float rate = update.step.lr * launch.trust[index];
  switch (tensor.dtype) {
    case DType::f32: return apply_to_chunk<float>(tensor, update, rate, begin, end);
    case DType::f16: return apply_to_chunk<half>(tensor, update, rate, begin, end);
    default: return apply_to_chunk<bfloat16>(tensor, update, rate, begin, end);
  }
}

}  // namespace

int64_t lamb_parts(const AdamTensor* tensors, int64_t num_tensors) {
  int64_t parts = 0;
  for (int64_t i = 0; i < num_tensors; ++i) parts += divide_up(tensors[i].count, kChunk);
  return parts;
}

void lamb_ema_cuda(const AdamTensor* tensors, const bool* adapted, int64_t num_tensors, const AdamCudaHyper& hyper,
                   LambSums* sums, float* trust, void* stream) {
  const AdamScalars scalars = adam_scalars_of(hyper);
  for_each_batch<LambTensor, kTensors>(
      num_tensors, kChunk, [&](int64_t i) { return LambTensor{tensors[i], adapted[i]}; },
      [&](const Batch<LambTensor, kTensors>& batch, uint32_t chunks) {
        const LambLaunch arguments{batch, scalars, sums, trust};
        launch(lamb_moments_kernel, Dim3{chunks}, Dim3{kThreads}, kSumBytes, stream, arguments);
        launch(lamb_trust_kernel, Dim3{batch.size}, Dim3{kThreads}, kSumBytes, stream, arguments);
        launch(lamb_apply_kernel, Dim3{chunks}, Dim3{kThreads}, 0, stream, arguments);
        sums += chunks;
        trust += batch.size;
      });
}

}  // namespace maskdm
