// Glue between the stable-ABI tensors of torch and the plain structs of the kernels. Included by *_bind.cpp only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>

#include "common/checks.h"
#include "common/dtype.h"

namespace maskdm {

using torch::stable::Tensor;

inline DType dtype_of(const char* op, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Byte: return DType::u8;
    default: fail(op, ": dtype ", static_cast<int>(tensor.scalar_type()), " has no kernel");
  }
}

inline const char* bytes_of(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }
inline char* mutable_bytes_of(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

template <class T>
inline const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// A value of a tensor in the accumulation type of `dtype`.
inline double read_accumulated(DType dtype, const char* values, int64_t index) {
  return dtype == DType::f64 ? reinterpret_cast<const double*>(values)[index]
                             : reinterpret_cast<const float*>(values)[index];
}
inline void write_accumulated(DType dtype, char* values, int64_t index, double value) {
  if (dtype == DType::f64) {
    reinterpret_cast<double*>(values)[index] = value;
  } else {
    reinterpret_cast<float*>(values)[index] = static_cast<float>(value);
  }
}

// The segments of a tensor [B, K, ...], or of a packed one [T, ...] with cu_seqlens [B + 1].
inline Segments segments_of(const char* op, const Tensor& tokens, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens.has_value()) return {tokens.size(0), tokens.size(1), nullptr};
  const Segments segments{cu_seqlens->size(0) - 1, 0, data_of<int32_t>(cu_seqlens)};
  check_segments(op, segments, tokens.size(0));
  return segments;
}

// Runs f(begin, end) over [0, count) on torch's threads; `cost` is the work of one item in roughly nanoseconds.
template <class F>
inline void parallel(int64_t count, double cost, const F& f) {
  constexpr double worth_a_thread = 20e3;
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(worth_a_thread / std::max(cost, 1e-3)));
  if (count > 0) torch::stable::parallel_for(0, count, grain, f);
}

// Uninitialised memory on a 64-byte boundary, freed at the end of the scope.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }
  char* get() const { return memory_; }

 private:
  char* memory_;
};

}  // namespace maskdm
