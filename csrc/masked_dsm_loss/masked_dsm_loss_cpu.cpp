#include "masked_dsm_loss/masked_dsm_loss.h"

#include <cmath>

namespace maskdm::MASKDM_ISA {
namespace {

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

template <class T>
struct Image {
  int64_t count;  // of values
  const T *pred, *target;
};

template <class T>
Image<T> image_at(const LossArgs& a, int64_t b) {
  const int64_t begin = segment_begin(a.segments, b) * a.width, end = segment_begin(a.segments, b + 1) * a.width;
  return {end - begin, reinterpret_cast<const T*>(a.pred) + begin, reinterpret_cast<const T*>(a.target) + begin};
}

template <class A, class T>
A difference(T pred, T target) {
  return static_cast<A>(to_acc(pred)) - static_cast<A>(to_acc(target));
}

template <class T, class Kind>
void value_typed(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  using A = accumulate_t<T>;
  const A delta = static_cast<A>(a.delta);
  for (int64_t b = image_begin; b < image_end; ++b) {
    const auto [count, pred, target] = image_at<T>(a, b);
    wider_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += Kind::value(difference<A>(pred[i], target[i]), delta);
    a.raw[b] = count > 0 ? static_cast<double>(sum / count) : 0.0;
  }
}

template <class T, class Kind>
void gradient_typed(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  using A = accumulate_t<T>;
  const A delta = static_cast<A>(a.delta);
  for (int64_t b = image_begin; b < image_end; ++b) {
    const auto [count, pred, target] = image_at<T>(a, b);
    T* grad = reinterpret_cast<T*>(a.grad) + (pred - reinterpret_cast<const T*>(a.pred));
    const A scale = static_cast<A>(a.scale[b]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      from_acc(scale * Kind::slope(difference<A>(pred[i], target[i]), delta), grad[i]);
    }
  }
}

// Calls f with null pointers of the C++ type and of the kind.
template <class F>
void dispatch(const LossArgs& a, const F& f) {
  dispatch_floating(a.dtype, [&](auto* type) {
    if (a.kind == 0) {
      f(type, static_cast<Mse*>(nullptr));
    } else if (a.kind == 1) {
      f(type, static_cast<L1*>(nullptr));
    } else {
      f(type, static_cast<Huber*>(nullptr));
    }
  });
}

void value(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  dispatch(a, [&]<class T, class Kind>(T*, Kind*) { value_typed<T, Kind>(a, image_begin, image_end); });
}

void gradient(const LossArgs& a, int64_t image_begin, int64_t image_end) {
  dispatch(a, [&]<class T, class Kind>(T*, Kind*) { gradient_typed<T, Kind>(a, image_begin, image_end); });
}

}  // namespace

const MaskedDsmLossKernels masked_dsm_loss_kernels = {value, gradient};

}  // namespace maskdm::MASKDM_ISA
