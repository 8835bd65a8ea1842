#include <algorithm>

#include "sid_loss/sid_loss.h"

namespace maskdm::MASKDM_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // values of three tensors, which the first level of cache holds for three gradients

template <class T>
const T* image_at(const char* values, const SidImages& a, int64_t b) {
  return values == nullptr ? nullptr : reinterpret_cast<const T*>(values) + b * a.count;
}

template <class A, class T>
A difference(T x, T y) {
  return static_cast<A>(to_acc(x)) - static_cast<A>(to_acc(y));
}

template <class T>
SidSums sums_of(const T* generated, const T* teacher, const T* fake, const T* xt, double inverse_alpha_t,
                const SidImages& a) {
  using A = accumulate_t<T>;
  const A alpha = static_cast<A>(a.alpha), inverse = static_cast<A>(inverse_alpha_t);
  wider_t<T> value = 0, size = 0;
  if (xt == nullptr) {
#pragma omp simd reduction(+ : value, size)
    for (int64_t i = 0; i < a.count; ++i) {
      const A d = difference<A>(teacher[i], fake[i]), e = difference<A>(teacher[i], generated[i]);
      value += d * (e - alpha * d);
      size += e < 0 ? -e : e;
    }
  } else {
#pragma omp simd reduction(+ : value, size)
    for (int64_t i = 0; i < a.count; ++i) {
      const A d = difference<A>(teacher[i], fake[i]), e = difference<A>(teacher[i], generated[i]);
      const A from_xt = static_cast<A>(to_acc(teacher[i])) - inverse * static_cast<A>(to_acc(xt[i]));
      value += d * (e - alpha * d);
      size += from_xt < 0 ? -from_xt : from_xt;
    }
  }
  return {static_cast<double>(value), static_cast<double>(size)};
}

void sums(const SidImages& a, const char* xt, const double* inverse_alpha_t, SidSums* sums, int64_t image_begin,
          int64_t image_end) {
  dispatch_floating(a.dtype, [&]<class T>(T*) {
    for (int64_t b = image_begin; b < image_end; ++b) {
      sums[b] = sums_of(image_at<T>(a.generated, a, b), image_at<T>(a.teacher, a, b), image_at<T>(a.fake, a, b),
                        image_at<T>(xt, a, b), inverse_alpha_t != nullptr ? inverse_alpha_t[b] : 1.0, a);
    }
  });
}

template <class T>
void gradient_of(const T* generated, const T* teacher, const T* fake, const SidSlope& slope, double factor, T* grad,
                 int64_t count) {
  using A = accumulate_t<T>;
  const A of_e = static_cast<A>(slope.of_e), of_d = static_cast<A>(slope.of_d), scale = static_cast<A>(factor);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A d = difference<A>(teacher[i], fake[i]), e = difference<A>(teacher[i], generated[i]);
    from_acc(scale * (of_e * e + of_d * d), grad[i]);
  }
}

template <class T>
void gradients_of_image(const SidImages& a, double factor, const SidGradients& grads, int64_t b) {
  const T *generated = image_at<T>(a.generated, a, b), *teacher = image_at<T>(a.teacher, a, b);
  const T* fake = image_at<T>(a.fake, a, b);
  for (int64_t begin = 0; begin < a.count; begin += kBlock) {
    const int64_t count = std::min(kBlock, a.count - begin);
    for (int which = 0; which < 3; ++which) {
      if (grads.to[which] == nullptr) continue;
      T* grad = reinterpret_cast<T*>(grads.to[which]) + b * a.count + begin;
      if (factor == 0.0) {
        std::fill_n(grad, count, T{});  // what is left out may hold anything
      } else {
        gradient_of(generated + begin, teacher + begin, fake + begin, sid_slope(which, a.alpha), factor, grad, count);
      }
    }
  }
}

void gradients(const SidImages& a, const double* factor, const SidGradients& grads, int64_t image_begin,
               int64_t image_end) {
  dispatch_floating(a.dtype, [&]<class T>(T*) {
    for (int64_t b = image_begin; b < image_end; ++b) gradients_of_image<T>(a, factor[b], grads, b);
  });
}

}  // namespace

const SidKernels sid_loss_kernels = {sums, gradients};

}  // namespace maskdm::MASKDM_ISA
