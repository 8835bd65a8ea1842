// What the kernels of adamw_ema and lamb_ema share: launches over lists of tensors, and the numbers of a step. For
// *_cuda.cu files.
#pragma once

#include <cmath>

#include "common/adam.h"
#include "common/cuda.h"

namespace maskdm {

constexpr int64_t kMaxArguments = 4096;  // bytes

// Tensors of one launch; those without elements are left out.
template <class Item, int kCapacity>
struct Batch {
  Item items[kCapacity];
  uint32_t first_chunk[kCapacity + 1];
  uint32_t size;

  struct Part {
    Item item;
    int64_t begin, end;
    uint32_t index;  // of the item
  };

  // Chunk `chunk`, which is of the last tensor that begins there or before.
  __device__ Part part(uint32_t chunk, int64_t length) const {
    uint32_t low = 0, high = size - 1;
    while (low < high) {
      const uint32_t middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int64_t begin = (chunk - first_chunk[low]) * length, count = items[low].count;
    return {items[low], begin, begin + length < count ? begin + length : count, low};
  }
};

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

// The numbers of a step as a kernel is given them.
struct AdamScalars {
  float beta1, rate1, beta2, rate2, eps, weight_decay, lr, ema_rate, bias1, inverse_bias2, log_beta1, log_beta2;
  const float *grad_scale, *lr_tensor;
  const int64_t* step_tensor;
  const double* ema_decay_tensor;
  const float* found_inf;

  __device__ bool skipped() const { return found_inf != nullptr && *found_inf != 0; }
};

inline AdamScalars adam_scalars_of(const AdamCudaHyper& h) {
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

// The same after a look at those that are in memory.
struct AdamStep {
  float beta1, rate1, beta2, rate2, eps, weight_decay, lr, ema_rate, bias1, inverse_bias2, grad_scale;

  __device__ explicit AdamStep(const AdamScalars& s)
      : beta1(s.beta1), rate1(s.rate1), beta2(s.beta2), rate2(s.rate2), eps(s.eps), weight_decay(s.weight_decay) {
    lr = s.lr_tensor != nullptr ? *s.lr_tensor : s.lr;
    bias1 = s.bias1;
    inverse_bias2 = s.inverse_bias2;
    if (s.step_tensor != nullptr) {
      // 1 - beta^step, without the digits that the difference loses for a beta near 1
      const float step = static_cast<float>(*s.step_tensor);
      bias1 = -expm1f(step * s.log_beta1);
      inverse_bias2 = 1.0f / sqrtf(-expm1f(step * s.log_beta2));
    }
    ema_rate = s.ema_decay_tensor != nullptr ? static_cast<float>(1.0 - *s.ema_decay_tensor) : s.ema_rate;
    grad_scale = s.grad_scale != nullptr ? *s.grad_scale : 1.0f;
  }

  __device__ void update_moments(float grad, float& m, float& v) const {
    const float g = grad * grad_scale;
    m = beta1 * m + rate1 * g;
    v = beta2 * v + rate2 * (g * g);
  }
};

// Whether N values of every list of the tensor are one access.
template <class T, int N>
__device__ bool is_aligned_for(const AdamTensor& t) {
  const auto of_params = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad);
  const auto of_state =
      reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v) | reinterpret_cast<uintptr_t>(t.ema);
  return of_params % (N * sizeof(T)) == 0 && of_state % (N * sizeof(float)) == 0 &&
         reinterpret_cast<uintptr_t>(t.copy) % (N * sizeof(half)) == 0;
}

template <class Copy, class T, int N>
__device__ void store_copy_as(char* copy, int64_t i, const Pack<T, N>& param) {
  Pack<Copy, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) MASKDM_ISA::from_acc(MASKDM_ISA::to_acc(param.values[j]), out.values[j]);
  store_pack(reinterpret_cast<Copy*>(copy) + i, out);
}

// The copy of N parameters, where there is one.
template <class T, int N>
__device__ void store_copy(const AdamTensor& t, int64_t i, const Pack<T, N>& param) {
  if (t.copy == nullptr) return;
  if (t.copy_dtype == DType::bf16) {
    store_copy_as<bfloat16>(t.copy, i, param);
  } else {
    store_copy_as<half>(t.copy, i, param);
  }
}

}  // namespace maskdm
