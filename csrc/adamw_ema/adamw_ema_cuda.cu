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
// Bytes, float32: 36 a parameter, 2 more with a 16-bit copy; the norm 4. About 20 FLOPs and 4 for the norm. The
// divisions and roots take a fifth of the instruction slots at the speed of memory.
//
// Must hold: all tensors are contiguous and of the types of adamw_ema.h; a launch has fewer than 2^31 chunks.
#include <cmath>

#include "adamw_ema/adamw_ema.h"
#include "common/block_sum.h"
#include "common/cuda.h"

namespace maskdm {
namespace {

using MASKDM_ISA::from_acc;
using MASKDM_ISA::to_acc;

constexpr int kThreads = 256;
constexpr int64_t kMaxArguments = 4096;
constexpr int64_t kChunk = 8192;
constexpr int kTensors = 56;
constexpr int64_t kNormChunk = 16384;
constexpr int kNormTensors = 140;
constexpr int kNormPacks = 4;  // read before the first is added up
constexpr int kSumThreads = 1024;

// Tensors of one launch; those without elements are left out.
template <class Item, int kCapacity>
struct Batch {
  Item items[kCapacity];
  uint32_t first_chunk[kCapacity + 1];
  uint32_t size;

  // The tensor of chunk `chunk`: the last one that begins there or before.
  __device__ uint32_t find(uint32_t chunk) const {
    uint32_t low = 0, high = size - 1;
    while (low < high) {
      const uint32_t middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

struct AdamItem {
  AdamTensor tensor;
  int64_t count;
};

struct AdamScalars {
  float beta1, rate1, beta2, rate2, eps, weight_decay, lr, ema_rate, bias1, inverse_bias2, log_beta1, log_beta2;
  const float *grad_scale, *lr_tensor;
  const int64_t* step_tensor;
  const double* ema_decay_tensor;
  const float* found_inf;
};

struct AdamLaunch {
  Batch<AdamItem, kTensors> batch;
  AdamScalars scalars;
};
static_assert(sizeof(AdamLaunch) <= kMaxArguments);

struct NormLaunch {
  Batch<NormTensor, kNormTensors> batch;
  double* partial;
};
static_assert(sizeof(NormLaunch) <= kMaxArguments);

struct Update {
  float beta1, rate1, beta2, rate2, eps, keep, step_size, inverse_bias2, ema_rate, grad_scale;

  __device__ explicit Update(const AdamScalars& s)
      : beta1(s.beta1), rate1(s.rate1), beta2(s.beta2), rate2(s.rate2), eps(s.eps) {
    const float lr = s.lr_tensor != nullptr ? *s.lr_tensor : s.lr;
    float bias1 = s.bias1;
    inverse_bias2 = s.inverse_bias2;
    if (s.step_tensor != nullptr) {
      // 1 - beta^step, without the digits that the difference loses for a beta near 1
      const float step = static_cast<float>(*s.step_tensor);
      bias1 = -expm1f(step * s.log_beta1);
      inverse_bias2 = 1.0f / sqrtf(-expm1f(step * s.log_beta2));
    }
    ema_rate = s.ema_decay_tensor != nullptr ? static_cast<float>(1.0 - *s.ema_decay_tensor) : s.ema_rate;
    keep = 1.0f - lr * s.weight_decay;
    step_size = lr / bias1;
    grad_scale = s.grad_scale != nullptr ? *s.grad_scale : 1.0f;
  }

  __device__ float operator()(float param, float grad, float& m, float& v, float& ema) const {
    const float g = grad * grad_scale;
    m = beta1 * m + rate1 * g;
    v = beta2 * v + rate2 * (g * g);
    const float p = param * keep - step_size * (m / (sqrtf(v) * inverse_bias2 + eps));
    ema += ema_rate * (p - ema);
    return p;
  }
};

template <class Copy, class T, int N>
__device__ void store_copy(char* copy, int64_t i, const Pack<T, N>& param) {
  Pack<Copy, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) from_acc(to_acc(param.values[j]), out.values[j]);
  store_pack(reinterpret_cast<Copy*>(copy) + i, out);
}

template <class T, int N>
__device__ void update_range(const AdamTensor& t, const Update& update, int64_t begin, int64_t end) {
  T* param_at = reinterpret_cast<T*>(t.param);
  float *m_at = reinterpret_cast<float*>(t.m), *v_at = reinterpret_cast<float*>(t.v),
        *ema_at = reinterpret_cast<float*>(t.ema);
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kThreads * N) {
    auto param = *reinterpret_cast<const Pack<T, N>*>(param_at + i);
    const auto grad = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(t.grad) + i);
    auto m = *reinterpret_cast<const Pack<float, N>*>(m_at + i);
    auto v = *reinterpret_cast<const Pack<float, N>*>(v_at + i);
    auto ema = *reinterpret_cast<const Pack<float, N>*>(ema_at + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float p = update(to_acc(param.values[j]), to_acc(grad.values[j]), m.values[j], v.values[j], ema.values[j]);
      from_acc(p, param.values[j]);
    }
    store_pack(param_at + i, param);
    store_pack(m_at + i, m);
    store_pack(v_at + i, v);
    store_pack(ema_at + i, ema);
    if (t.copy != nullptr) {
      if (t.copy_dtype == DType::bf16) {
        store_copy<bfloat16>(t.copy, i, param);
      } else {
        store_copy<half>(t.copy, i, param);
      }
    }
  }
}

template <class T>
__device__ void update_chunk(const AdamTensor& t, const Update& update, int64_t begin, int64_t end) {
  constexpr int N = 4;
  const auto of_params = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad);
  const auto of_state =
      reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v) | reinterpret_cast<uintptr_t>(t.ema);
  const bool aligned = of_params % (N * sizeof(T)) == 0 && of_state % (N * sizeof(float)) == 0 &&
                       reinterpret_cast<uintptr_t>(t.copy) % (N * sizeof(half)) == 0;
  const int64_t last = aligned ? end / N * N : begin;
  update_range<T, N>(t, update, begin, last);
  update_range<T, 1>(t, update, last, end);
}

// One block: one chunk of one tensor.
__global__ void __launch_bounds__(kThreads) adamw_ema_kernel(AdamLaunch launch) {
  if (launch.scalars.found_inf != nullptr && *launch.scalars.found_inf != 0) return;
  const uint32_t index = launch.batch.find(blockIdx.x);
  const AdamItem item = launch.batch.items[index];
  const Update update(launch.scalars);
  const int64_t begin = (blockIdx.x - launch.batch.first_chunk[index]) * kChunk;
  const int64_t end = begin + kChunk < item.count ? begin + kChunk : item.count;
  switch (item.tensor.dtype) {
    case DType::f32: return update_chunk<float>(item.tensor, update, begin, end);
    case DType::f16: return update_chunk<half>(item.tensor, update, begin, end);
    default: return update_chunk<bfloat16>(item.tensor, update, begin, end);
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
  const uint32_t index = launch.batch.find(blockIdx.x);
  const NormTensor item = launch.batch.items[index];
  const int64_t begin = (blockIdx.x - launch.batch.first_chunk[index]) * kNormChunk;
  const int64_t end = begin + kNormChunk < item.count ? begin + kNormChunk : item.count;
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

// Calls start(batch, chunks) for the tensors 0 to num_tensors - 1, as many at a time as a batch holds.
template <class Item, int kCapacity, class ItemOf, class Start>
void for_each_batch(int64_t num_tensors, int64_t chunk, const ItemOf& item_of, const Start& start) {
  Batch<Item, kCapacity> batch{};
  const auto flush = [&] {
    if (batch.size > 0) start(batch, batch.first_chunk[batch.size]);
    batch.size = 0;
  };
  for (int64_t i = 0; i < num_tensors; ++i) {
    const Item item = item_of(i);
    if (item.count == 0) continue;
    if (batch.size == kCapacity) flush();
    batch.items[batch.size] = item;
    batch.first_chunk[batch.size + 1] =
        batch.first_chunk[batch.size] + static_cast<uint32_t>(divide_up(item.count, chunk));
    ++batch.size;
  }
  flush();
}

AdamScalars scalars_of(const AdamCudaHyper& h) {
  const auto step = static_cast<double>(h.step);
  AdamScalars s{};
  s.beta1 = static_cast<float>(h.beta1), s.rate1 = static_cast<float>(1 - h.beta1);
  s.beta2 = static_cast<float>(h.beta2), s.rate2 = static_cast<float>(1 - h.beta2);
  s.eps = static_cast<float>(h.eps), s.weight_decay = static_cast<float>(h.weight_decay);
  s.lr = static_cast<float>(h.lr), s.ema_rate = static_cast<float>(1 - h.ema_decay);
  s.bias1 = static_cast<float>(1 - std::pow(h.beta1, step));
  s.inverse_bias2 = static_cast<float>(1 / std::sqrt(1 - std::pow(h.beta2, step)));
  s.log_beta1 = static_cast<float>(std::log(h.beta1)), s.log_beta2 = static_cast<float>(std::log(h.beta2));
  s.grad_scale = h.grad_scale, s.lr_tensor = h.lr_tensor;
  s.step_tensor = h.step_tensor, s.ema_decay_tensor = h.ema_decay_tensor, s.found_inf = h.found_inf;
  return s;
}

}  // namespace

void adamw_ema_cuda(const AdamTensor* tensors, const int64_t* counts, int64_t num_tensors, const AdamCudaHyper& hyper,
                    void* stream) {
  const AdamScalars scalars = scalars_of(hyper);
  for_each_batch<AdamItem, kTensors>(
      num_tensors, kChunk, [&](int64_t i) { return AdamItem{tensors[i], counts[i]}; },
      [&](const Batch<AdamItem, kTensors>& batch, uint32_t chunks) {
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
