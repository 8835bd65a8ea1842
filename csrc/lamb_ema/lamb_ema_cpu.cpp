#include "lamb_ema/lamb_ema.h"

namespace maskdm::MASKDM_ISA {
namespace {

// A block of the low-precision copy is converted while the parameters it comes from are in the first cache.
constexpr int64_t kBlock = 1024;

template <class A>
inline A update_of(const AdamNumbers<A>& n, A param, A m, A v) {
  return (m * n.inverse_bias1) / (std::sqrt(v) * n.inverse_bias2 + n.eps) + n.weight_decay * param;
}

template <class T>
LambSums update_moments_typed(const AdamTensor& t, const AdamHyper& h, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using Wide = wider_t<A>;
  const T* __restrict param = reinterpret_cast<const T*>(t.param);
  const T* __restrict grad = reinterpret_cast<const T*>(t.grad);
  A* __restrict m = reinterpret_cast<A*>(t.m);
  A* __restrict v = reinterpret_cast<A*>(t.v);
  const AdamNumbers<A> n(h);
  Wide of_param = 0, of_update = 0;
#pragma omp simd reduction(+ : of_param, of_update)
  for (int64_t i = begin; i < end; ++i) {
    const A g = static_cast<A>(to_acc(grad[i])) * n.grad_scale, p = static_cast<A>(to_acc(param[i]));
    const A first = n.beta1 * m[i] + n.one_minus_beta1 * g;
    const A second = n.beta2 * v[i] + n.one_minus_beta2 * (g * g);
    m[i] = first;
    v[i] = second;
    const Wide wide_p = p, wide_r = update_of(n, p, first, second);
    of_param += wide_p * wide_p;
    of_update += wide_r * wide_r;
  }
  return {static_cast<double>(of_param), static_cast<double>(of_update)};
}

template <class T>
void apply_typed(const AdamTensor& t, const AdamHyper& h, double trust, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  T* __restrict param = reinterpret_cast<T*>(t.param);
  const A* __restrict m = reinterpret_cast<const A*>(t.m);
  const A* __restrict v = reinterpret_cast<const A*>(t.v);
  A* __restrict ema = reinterpret_cast<A*>(t.ema);
  const AdamNumbers<A> n(h);
  const A rate = A(h.lr * trust);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) {
      const A before = static_cast<A>(to_acc(param[i]));
      const A p = before - rate * update_of(n, before, m[i], v[i]);
      ema[i] += n.ema_rate * (p - ema[i]);
      from_acc(p, param[i]);
    }
    write_copy(t, param, start, stop);
  }
}

LambSums update_moments(const AdamTensor& t, const AdamHyper& h, int64_t begin, int64_t end) {
  LambSums sums{};
  dispatch_floating(t.dtype, [&](auto* type) {
    sums = update_moments_typed<std::remove_pointer_t<decltype(type)>>(t, h, begin, end);
  });
  return sums;
}

void apply(const AdamTensor& t, const AdamHyper& h, double trust, int64_t begin, int64_t end) {
  dispatch_floating(t.dtype,
                    [&](auto* type) { apply_typed<std::remove_pointer_t<decltype(type)>>(t, h, trust, begin, end); });
}

}  // namespace

const LambEmaKernels lamb_ema_kernels = {update_moments, apply};

}  // namespace maskdm::MASKDM_ISA
