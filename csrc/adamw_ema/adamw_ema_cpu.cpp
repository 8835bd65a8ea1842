#include "adamw_ema/adamw_ema.h"

#include <cmath>

namespace maskdm::MASKDM_ISA {
namespace {

// A block of the low-precision copy is converted while the parameters it comes from are in the first cache.
constexpr int64_t kBlock = 1024;

template <class T, bool kHasM, bool kHasEma>
void run_typed(const AdamTensor& t, const AdamHyper& h, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  T* __restrict param = reinterpret_cast<T*>(t.param);
  const T* __restrict grad = reinterpret_cast<const T*>(t.grad);
  A* __restrict m = reinterpret_cast<A*>(t.m);
  A* __restrict v = reinterpret_cast<A*>(t.v);
  A* __restrict ema = reinterpret_cast<A*>(t.ema);
  const AdamNumbers<A> n(h);
  const A keep = A(1 - h.lr * h.weight_decay), step_size = A(h.lr / h.bias1);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) {
      const A g = static_cast<A>(to_acc(grad[i])) * n.grad_scale;
      A first = g;
      if constexpr (kHasM) m[i] = first = n.beta1 * m[i] + n.one_minus_beta1 * g;
      const A second = n.beta2 * v[i] + n.one_minus_beta2 * (g * g);
      const A p =
          static_cast<A>(to_acc(param[i])) * keep - step_size * (first / (std::sqrt(second) * n.inverse_bias2 + n.eps));
      v[i] = second;
      if constexpr (kHasEma) ema[i] += n.ema_rate * (p - ema[i]);
      from_acc(p, param[i]);
    }
    write_copy(t, param, start, stop);
  }
}

void run(const AdamTensor& t, const AdamHyper& h, int64_t begin, int64_t end) {
  dispatch_floating(t.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool has_m = t.m != nullptr, has_ema = t.ema != nullptr;
    if (has_m && has_ema) {
      run_typed<T, true, true>(t, h, begin, end);
    } else if (has_m) {
      run_typed<T, true, false>(t, h, begin, end);
    } else if (has_ema) {
      run_typed<T, false, true>(t, h, begin, end);
    } else {
      run_typed<T, false, false>(t, h, begin, end);
    }
  });
}

// In double or better, so that neither large nor many values overflow or are lost.
template <class T>
double sum_of_squares_typed(const T* values, int64_t count) {
  wider_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<wider_t<T>>(to_acc(values[i]));
    sum += value * value;
  }
  return static_cast<double>(sum);
}

double sum_of_squares(DType dtype, const char* values, int64_t begin, int64_t end) {
  double sum = 0;
  dispatch_floating(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum = sum_of_squares_typed(reinterpret_cast<const T*>(values) + begin, end - begin);
  });
  return sum;
}

}  // namespace

const AdamwEmaKernels adamw_ema_kernels = {run, sum_of_squares};

}  // namespace maskdm::MASKDM_ISA
