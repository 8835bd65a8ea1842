#include "masked_dsm_loss/masked_dsm_loss.h"

#include <cmath>

namespace maskdm::MASKDM_ISA {
namespace {

// Sums are in the next wider type: accurate for long images, also where a compiler does not spread the loop over lanes.
template <class T>
struct wider {
  using type = double;
};
template <>
struct wider<double> {
  using type = long double;
};

struct Mse {
  template <class A>
  static A value(A d, A) {
    return d * d;
  }
  template <class A>
  static A slope(A d, A) {
    return A(2) * d;
  }
};
struct L1 {
  template <class A>
  static A value(A d, A) {
    return d < 0 ? -d : d;
  }
  template <class A>
  static A slope(A d, A) {
    return d > 0 ? A(1) : d < 0 ? A(-1) : d;  // 0 at 0, NaN at NaN
  }
};
struct Huber {
  template <class A>
  static A value(A d, A delta) {
    const A size = d < 0 ? -d : d;
    return size > delta ? delta * (size - A(0.5) * delta) : A(0.5) * d * d;
  }
  template <class A>
  static A slope(A d, A delta) {
    return d > delta ? delta : d < -delta ? -delta : d;
  }
};

template <class T, class Kind, bool WithGrad>
void run_typed(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  using A = accumulate_t<T>;
  const A delta = static_cast<A>(a.delta);
  for (int64_t b = image_begin; b < image_end; ++b) {
    const int64_t begin = segment_begin(a.segments, b) * a.width;
    const int64_t count = segment_begin(a.segments, b + 1) * a.width - begin;
    const T* pred = reinterpret_cast<const T*>(a.pred) + begin;
    const T* target = reinterpret_cast<const T*>(a.target) + begin;
    T* grad = WithGrad ? reinterpret_cast<T*>(a.grad) + begin : nullptr;
    const A weight = a.weight != nullptr ? reinterpret_cast<const A*>(a.weight)[b] : A(1);
    const A factor = count > 0 ? weight / static_cast<A>(count) : A(0);
    typename wider<T>::type sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const A d = static_cast<A>(to_acc(pred[i])) - static_cast<A>(to_acc(target[i]));
      sum += Kind::value(d, delta);
      if constexpr (WithGrad) from_acc(factor * Kind::slope(d, delta), grad[i]);
    }
    reinterpret_cast<A*>(a.raw)[b] = count > 0 ? static_cast<A>(sum / count) : A(0);
  }
}

template <class T, class Kind>
void run_kind(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  if (a.grad != nullptr) {
    run_typed<T, Kind, true>(a, image_begin, image_end);
  } else {
    run_typed<T, Kind, false>(a, image_begin, image_end);
  }
}

void run(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  dispatch_floating(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.kind == 0) {
      run_kind<T, Mse>(a, image_begin, image_end);
    } else if (a.kind == 1) {
      run_kind<T, L1>(a, image_begin, image_end);
    } else {
      run_kind<T, Huber>(a, image_begin, image_end);
    }
  });
}

}  // namespace

const MaskedDsmLossKernels masked_dsm_loss_kernels = {run};

}  // namespace maskdm::MASKDM_ISA
