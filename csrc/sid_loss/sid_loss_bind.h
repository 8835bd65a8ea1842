// What the CPU and the CUDA binding of sid_loss share: tensors as the structs of the kernels, and their results.
#pragma once

#include <tuple>
#include <utility>

#include "common/bind.h"
#include "sid_loss/sid_loss.h"

namespace maskdm {

// generated, teacher, fake [B, ...], contiguous, of one shape and dtype
inline SidImages sid_images_of(const Tensor& generated, const Tensor& teacher, const Tensor& fake, double alpha) {
  int64_t count = 1;
  for (int64_t axis = 1; axis < generated.dim(); ++axis) count *= generated.size(axis);
  return {dtype_of("sid_loss", generated),
          generated.size(0),
          count,
          alpha,
          bytes_of(generated),
          bytes_of(teacher),
          bytes_of(fake)};
}

// New tensors: loss [] with `mean`, else [B], and scale [B]
inline std::pair<Tensor, Tensor> sid_results(const Tensor& generated, const SidImages& images, bool mean) {
  using torch::headeronly::ScalarType;
  const auto dtype = images.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  return {mean ? torch::stable::new_empty(generated, {}, dtype)
               : torch::stable::new_empty(generated, {images.num_images}, dtype),
          torch::stable::new_empty(generated, {images.num_images}, dtype)};
}

// The three gradients, like `generated`; empty where they are not wanted.
class SidGradientTensors {
 public:
  SidGradientTensors(const Tensor& generated, bool to_generated, bool to_teacher, bool to_fake)
      : wanted_{to_generated, to_teacher, to_fake},
        grads_{make(generated, to_generated), make(generated, to_teacher), make(generated, to_fake)} {}

  SidGradients pointers() {
    SidGradients to{};
    for (int i = 0; i < 3; ++i) to.to[i] = wanted_[i] ? mutable_bytes_of(grads_[i]) : nullptr;
    return to;
  }
  std::tuple<Tensor, Tensor, Tensor> all() const { return {grads_[0], grads_[1], grads_[2]}; }

 private:
  static Tensor make(const Tensor& like, bool wanted) {
    return wanted ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
  }
  bool wanted_[3];
  Tensor grads_[3];
};

}  // namespace maskdm
