#include "gelu/gelu.h"

#include <cmath>

#include "common/simd.h"

namespace maskdm::MASKDM_ISA {
namespace {

constexpr double kInverseSqrt2 = 0.70710678118654752, kInverseSqrt2Pi = 0.39894228040143268;

struct Normal {
  template <class V>
  struct Pair {
    V distribution, density;
  };

  // Phi(-|x|) = exp(-x^2 / 2) t q(t), t = 1 / (1 + 0.35 |x|): Mills' ratio is smooth in t. q is fitted on |x| < 14, where
  // the relative error is below 3.2e-8, half an ulp; further out the exponential is 0.
  static MASKDM_INLINE Pair<vfloat> at(vfloat x) {
    const vfloat size = x < 0.0f ? -x : x;
    const vfloat e = exp_of(x * x * -0.5f), t = 1.0f / (1.0f + 0.35f * size);
    vfloat q = splat(-0.0291459690f);
    q = q * t + 0.143971880f;
    q = q * t - 0.255714615f;
    q = q * t + 0.159174551f;
    q = q * t - 0.0231100878f;
    q = q * t + 0.105508103f;
    q = q * t + 0.119832845f;
    q = q * t + 0.139861872f;
    q = q * t + 0.139621404f;
    const vfloat tail = e * (t * q);
    return {x < 0.0f ? tail : 1.0f - tail, e * static_cast<float>(kInverseSqrt2Pi)};
  }
  static MASKDM_INLINE Pair<double> at(double x) {
    return {0.5 * std::erfc(-x * kInverseSqrt2), kInverseSqrt2Pi * std::exp(-0.5 * x * x)};
  }
};

// One vector (or one double) of out.
template <class V>
MASKDM_INLINE V value(V x) {
  return x * Normal::at(x).distribution;
}
template <class V>
MASKDM_INLINE V value(V x, V grad) {
  const auto normal = Normal::at(x);
  return grad * (normal.distribution + x * normal.density);
}

void run_double(const GeluArgs& a, int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const double*>(a.x);
  const auto* grad = reinterpret_cast<const double*>(a.grad);
  auto* out = reinterpret_cast<double*>(a.out);
  for (int64_t i = begin; i < end; ++i) out[i] = grad != nullptr ? value(x[i], grad[i]) : value(x[i]);
}

// `count` values as floats, and back; what lies beyond them in the vector is 0.
template <class T>
MASKDM_INLINE vfloat widen(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kLanes<float>) return load(from);
  }
  float values[kLanes<float>] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_acc(from[i]);
  return load(values);
}
template <class T>
MASKDM_INLINE void narrow(vfloat v, T* to, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kLanes<float>) return store(to, v);
  }
  float values[kLanes<float>];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) from_acc(values[i], to[i]);
}

template <class T, bool Backward>
void run_typed(const GeluArgs& a, int64_t begin, int64_t end) {
  const T* x = reinterpret_cast<const T*>(a.x);
  const T* grad = reinterpret_cast<const T*>(a.grad);
  T* out = reinterpret_cast<T*>(a.out);
  const auto step = [&](int64_t i, int64_t count) {
    if constexpr (Backward) {
      narrow(value(widen(x + i, count), widen(grad + i, count)), out + i, count);
    } else {
      narrow(value(widen(x + i, count)), out + i, count);
    }
  };
  int64_t i = begin;
  for (; i + kLanes<float> <= end; i += kLanes<float>) step(i, kLanes<float>);
  if (i < end) step(i, end - i);
}

void run(const GeluArgs& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, double>) {
      run_double(a, begin, end);
    } else if (a.grad != nullptr) {
      run_typed<T, true>(a, begin, end);
    } else {
      run_typed<T, false>(a, begin, end);
    }
  });
}

}  // namespace

const GeluKernels gelu_kernels = {run};

}  // namespace maskdm::MASKDM_ISA
