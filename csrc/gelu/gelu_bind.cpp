#include "gelu/gelu.h"

#include "common/bind.h"

namespace maskdm {
namespace {

constexpr int64_t kChunk = 4096;  // a multiple of every vector, so that only the last chunk has a ragged end
constexpr double kNanosecondsPerValue = 0.2;

Tensor run(GeluArgs args, const Tensor& like) {
  Tensor out = torch::stable::empty_like(like);
  args.dtype = dtype_of("gelu", like);
  args.out = mutable_bytes_of(out);
  const int64_t count = like.numel();
  const auto& kernels = MASKDM_KERNELS(gelu_kernels);
  parallel((count + kChunk - 1) / kChunk, kChunk * kNanosecondsPerValue,
           [&](int64_t begin, int64_t end) { kernels.run(args, begin * kChunk, std::min(end * kChunk, count)); });
  return out;
}

// x of any shape, contiguous
Tensor gelu_fwd(Tensor x) { return run({DType::f32, bytes_of(x), nullptr, nullptr}, x); }

// grad, x of one shape, contiguous
Tensor gelu_bwd(Tensor grad, Tensor x) { return run({DType::f32, bytes_of(x), bytes_of(grad), nullptr}, x); }

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def("gelu_fwd(Tensor x) -> Tensor");
  m.def("gelu_bwd(Tensor grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&maskdm::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&maskdm::gelu_bwd));
}
