// How the losses go through their tensors: an image is shared by `parts` blocks, which take its chunks in turns, 16
// bytes of each tensor and thread at a time. For *_cuda.cu files.
#pragma once

#include <type_traits>

#include "common/cuda.h"

namespace maskdm {

constexpr int64_t kEnoughBlocks = 8192;  // some times as many as any GPU runs at once

// Blocks that share one image: one for every chunk of the average image, while there are not enough of them.
inline uint32_t parts_of(int64_t num_images, int64_t all_values, int64_t chunk) {
  const int64_t images = num_images > 1 ? num_images : 1;
  const int64_t wanted = divide_up(all_values, images * chunk), enough = divide_up(kEnoughBlocks, images);
  const int64_t parts = wanted < enough ? wanted : enough;
  return static_cast<uint32_t>(parts > 1 ? parts : 1);
}

// Calls on_values(first, values) for the values [begin, end) of all tensors that this block takes, where values[t] is an
// array of those from `first` on of inputs[t]. With N > 1 the inputs lie on a boundary of 16 bytes, and values before the
// first and after the last multiple of N go one by one, to block 0.
template <int kThreads, int kChunk, int N, int kInputs, class T, class OnValues>
__device__ inline void for_each_values(const T* const (&inputs)[kInputs], int64_t begin, int64_t end, uint32_t part,
                                       uint32_t parts, const OnValues& on_values) {
  constexpr int kPacks = kChunk / (kThreads * N);
  using Values = Pack<T, N>;
  const int64_t aligned = (begin + N - 1) / N * N;
  const int64_t first = aligned < end ? aligned : end;
  const int64_t last = end / N * N > first ? end / N * N : first;

  const auto one_by_one = [&](int64_t from, int64_t to) {
    const int64_t i = from + threadIdx.x;
    if (i < to) {
      float values[kInputs][1];
#pragma unroll
      for (int t = 0; t < kInputs; ++t) values[t][0] = MASKDM_ISA::to_acc(inputs[t][i]);
      on_values(i, values);
    }
  };
  if (N > 1 && part == 0) {
    one_by_one(begin, first);
    one_by_one(last, end);
  }
  for (int64_t chunk = first + static_cast<int64_t>(part) * kChunk; chunk < last;
       chunk += static_cast<int64_t>(parts) * kChunk) {
    Values packs[kPacks][kInputs];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t i = chunk + (k * kThreads + static_cast<int>(threadIdx.x)) * N;
#pragma unroll
      for (int t = 0; t < kInputs; ++t) packs[k][t] = Values{};
      if (i < last) {
#pragma unroll
        for (int t = 0; t < kInputs; ++t) packs[k][t] = *reinterpret_cast<const Values*>(inputs[t] + i);
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t i = chunk + (k * kThreads + static_cast<int>(threadIdx.x)) * N;
      if (i < last) {
        float values[kInputs][N];
#pragma unroll
        for (int t = 0; t < kInputs; ++t) {
#pragma unroll
          for (int j = 0; j < N; ++j) values[t][j] = MASKDM_ISA::to_acc(packs[k][t].values[j]);
        }
        on_values(i, values);
      }
    }
  }
}

// The sum of the values, as a tree of fixed shape; they are overwritten.
template <int N>
__device__ inline float tree_sum(float (&values)[N]) {
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) values[j] += values[j + half];
  }
  return values[0];
}

// Calls f with a null pointer of the element type and an integral constant, the values of one access: 16 bytes of them
// where all tensors are `aligned` to that, else one.
template <class F>
inline void dispatch_accesses(const char* op, DType dtype, bool aligned, const F& f) {
  const auto with = [&](auto* type) {
    constexpr int kValues = 16 / static_cast<int>(sizeof(*type));
    if (aligned) {
      f(type, std::integral_constant<int, kValues>{});
    } else {
      f(type, std::integral_constant<int, 1>{});
    }
  };
  switch (dtype) {
    case DType::f32: return with(static_cast<float*>(nullptr));
    case DType::f16: return with(static_cast<half*>(nullptr));
    case DType::bf16: return with(static_cast<bfloat16*>(nullptr));
    default: fail(op, ": the CUDA kernels have float32, float16 and bfloat16 only");
  }
}

}  // namespace maskdm
