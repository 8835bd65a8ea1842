// The formulas of adamw_ema.h for lists of tensors, in as few launches as the arguments of a kernel allow.
//
// A launch takes the addresses and sizes of up to 56 tensors in its 4 KiB of arguments, so nothing is copied to the GPU
// beforehand. One block updates one chunk of 8192 parameters of one tensor, which it finds by bisection: a thread holds 4
// parameters at a time, in 16-byte accesses of float lists and 8-byte ones of 16-bit lists. The last parameters of a
// tensor, and all of one that does not begin on such a boundary, go one by one. lr, step, ema_decay and the clipping
// factor are read from memory where they are tensors, so that a CUDA graph replays with what they hold then. So is
// found_inf, first of all: where it is not 0 a block reads and writes nothing else.
//
// The norm has 16-byte reads of chunks of 16384 values, up to 140 tensors a launch; squares and sums are in double, as
// trees of fixed shape; one more block adds the sums of the chunks.
//
// Bytes, float32: 36 a parameter, 8 less without m and 8 without ema, 2 more with a 16-bit copy; the norm 4. About 20
// FLOPs and 4 for the norm. The divisions and roots take a fifth of the instruction slots at the speed of memory.
//
// Must hold: all tensors are contiguous and of the types of adamw_ema.h; a launch has fewer than 2^31 chunks.
#include "adamw_ema/adamw_ema.h"
#include "common/adam_cuda.h"
#include "common/block_sum.h"
#include "common/cuda.h"

namespace maskdm {
namespace {

using MASKDM_ISA::from_acc;
using MASKDM_ISA::to_acc;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;
constexpr int kTensors = 56;
constexpr int64_t kNormChunk = 16384;
constexpr int kNormTensors = 140;
constexpr int kNormPacks = 4;  // read before the first is added up
constexpr int kSumThreads = 1024;

struct AdamLaunch {
  Batch<AdamTensor, kTensors> batch;
  AdamScalars scalars;
};
static_assert(sizeof(AdamLaunch) <= kMaxArguments);

struct NormLaunch {
  Batch<NormTensor, kNormTensors> batch;
  double* partial;
};
static_assert(sizeof(NormLaunch) <= kMaxArguments);

struct Update {
  AdamStep step;
  float keep, step_size;

  __device__ explicit Update(const AdamScalars& scalars)
      : step(scalars), keep(1.0f - step.lr * step.weight_decay), step_size(step.lr / step.bias1) {}

  __device__ float operator()(float param, float grad, float& m, float& v, float& ema) const {
    step.update_moments(grad, m, v);
    const float p = param * keep - step_size * (m / (sqrtf(v) * step.inverse_bias2 + step.eps));
    ema += step.ema_rate * (p - ema);
    return p;
  }
};

template <class T, int N>
__device__ void update_range(const AdamTensor& t, const Update& update, int64_t begin, int64_t end) {
  T* param_at = reinterpret_cast<T*>(t.param);
  float *m_at = reinterpret_cast<float*>(t.m), *v_at = reinterpret_cast<float*>(t.v),
        *ema_at = reinterpret_cast<float*>(t.ema);
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kThreads * N) {
    auto param = *reinterpret_cast<const Pack<T, N>*>(param_at + i);
    const auto grad = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(t.grad) + i);
    // Zeros stand for an m that is not there: beta1 = 0 takes nothing of it.
    auto m = m_at != nullptr ? *reinterpret_cast<const Pack<float, N>*>(m_at + i) : Pack<float, N>{};
    auto v = *reinterpret_cast<const Pack<float, N>*>(v_at + i);
    auto ema = ema_at != nullptr ? *reinterpret_cast<const Pack<float, N>*>(ema_at + i) : Pack<float, N>{};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float p = update(to_acc(param.values[j]), to_acc(grad.values[j]), m.values[j], v.values[j], ema.values[j]);
      from_acc(p, param.values[j]);
    }
    store_pack(param_at + i, param);
    if (m_at != nullptr) store_pack(m_at + i, m);
    store_pack(v_at + i, v);
    if (ema_at != nullptr) store_pack(ema_at + i, ema);
    store_copy(t, i, param);
  }
}

template <class T>
__device__ void update_chunk(const AdamTensor& t, const Update& update, int64_t begin, int64_t end) {
  constexpr int N = 4;
  const int64_t last = is_aligned_for<T, N>(t) ? end / N * N : begin;
  update_range<T, N>(t, update, begin, last);
  update_range<T, 1>(t, update, last, end);
}

// One block: one chunk of one tensor.
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(AdamLaunch launch) {
  if (launch.scalars.skipped()) return;
  const auto [tensor, begin, end, index] = launch.batch.part(blockIdx.x, kChunk);
  const Update update(launch.scalars);
  switch (tensor.dtype) {
    case DType::f32: return update_chunk<float>(tensor, update, begin, end);
    case DType::f16: return update_chunk<half>(tensor, update, begin, end);
    default: return update_chunk<bfloat16>(tensor, update, begin, end);
  }
}

template <class T, int N>
__device__ double sum_of_range(const T* values, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kThreads * N * kNormPacks) {
    Pack<T, N> packs[kNormPacks];
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k) {
      const int64_t at = i + k * kThreads * N;
      packs[k] = at < end ? *reinterpret_cast<const Pack<T, N>*>(values + at) : Pack<T, N>{};
    }
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const double value = static_cast<double>(to_acc(packs[k].values[j]));
        sum += value * value;
      }
    }
  }
  return sum;
}

template <class T>
__device__ double sum_of_chunk(const char* bytes, int64_t begin, int64_t end) {
  constexpr int N = 16 / sizeof(T);
  const T* values = reinterpret_cast<const T*>(bytes);
  const int64_t last = reinterpret_cast<uintptr_t>(bytes) % 16 == 0 ? end / N * N : begin;
  return sum_of_range<T, N>(values, begin, last) + sum_of_range<T, 1>(values, last, end);
}

// One block: partial[block] = the sum of squares of one chunk of one tensor.
__global__ void __launch_bounds__(kThreads) sum_of_squares_kernel(NormLaunch launch) {
  const auto [item, begin, end, index] = launch.batch.part(blockIdx.x, kNormChunk);
  double sum = 0;
  switch (item.dtype) {
    case DType::f32: sum = sum_of_chunk<float>(item.values, begin, end); break;
    case DType::f64: sum = sum_of_chunk<double>(item.values, begin, end); break;
    case DType::f16: sum = sum_of_chunk<half>(item.values, begin, end); break;
    default: sum = sum_of_chunk<bfloat16>(item.values, begin, end); break;
  }
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) launch.partial[blockIdx.x] = sum;
}

// One block: norm = the root of the sum of `partial`.
template <class Norm>
__global__ void __launch_bounds__(kSumThreads) norm_kernel(const double* partial, int64_t count, Norm* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partial[i];
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) *norm = static_cast<Norm>(sqrt(sum));
}

}  // namespace

void adamw_ema_cuda(const AdamTensor* tensors, int64_t num_tensors, const AdamCudaHyper& hyper, void* stream) {
  const AdamScalars scalars = adam_scalars_of(hyper);
  for_each_batch<AdamTensor, kTensors>(
      num_tensors, kChunk, [&](int64_t i) { return tensors[i]; },
      [&](const Batch<AdamTensor, kTensors>& batch, uint32_t chunks) {
        launch(adamw_ema_kernel, Dim3{chunks}, Dim3{kThreads}, 0, stream, AdamLaunch{batch, scalars});
      });
}

int64_t norm_parts(const NormTensor* tensors, int64_t num_tensors) {
  int64_t parts = 0;
  for (int64_t i = 0; i < num_tensors; ++i) parts += divide_up(tensors[i].count, kNormChunk);
  return parts;
}

void global_norm_cuda(const NormTensor* tensors, int64_t num_tensors, double* partial, bool in_double, char* norm,
                      void* stream) {
  constexpr int64_t kSumBytes = kThreads / 32 * sizeof(double), kAllSumBytes = kSumThreads / 32 * sizeof(double);
  int64_t done = 0;
  for_each_batch<NormTensor, kNormTensors>(
      num_tensors, kNormChunk, [&](int64_t i) { return tensors[i]; },
      [&](const Batch<NormTensor, kNormTensors>& batch, uint32_t chunks) {
        launch(sum_of_squares_kernel, Dim3{chunks}, Dim3{kThreads}, kSumBytes, stream,
               NormLaunch{batch, partial + done});
        done += chunks;
      });
  const auto finish = [&]<class Norm>(Norm* result) {
    launch(norm_kernel<Norm>, Dim3{1}, Dim3{kSumThreads}, kAllSumBytes, stream, partial, done, result);
  };
  if (in_double) {
    finish(reinterpret_cast<double*>(norm));
  } else {
    finish(reinterpret_cast<float*>(norm));
  }
}

}  // namespace maskdm
