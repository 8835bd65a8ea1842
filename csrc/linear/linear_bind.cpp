#include "linear/linear.h"

#include <tuple>

#include "common/bind.h"

namespace maskdm {
namespace {

constexpr double kNanosecondsPerValue = 0.3;

// x [M, N] float32, contiguous -> [N, M], and the sums of its columns [N] (or empty [0])
std::tuple<Tensor, Tensor> linear_transpose(Tensor x, bool with_sums) {
  const char* op = "linear";
  if (dtype_of(op, x) != DType::f32) fail(op, ": the transpose kernel takes float32");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(x, {columns, rows});
  Tensor sums = torch::stable::new_empty(x, {with_sums ? columns : 0});
  const TransposeArgs args{rows, columns, static_cast<const float*>(x.const_data_ptr()),
                           static_cast<float*>(out.mutable_data_ptr()),
                           with_sums ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr};
  const auto& kernels = MASKDM_KERNELS(linear_kernels);
  const int64_t items = (columns + kernels.columns_per_item - 1) / kernels.columns_per_item;
  parallel(items, kNanosecondsPerValue * static_cast<double>(rows * kernels.columns_per_item),
           [&](int64_t begin, int64_t end) { kernels.run(args, begin, end); });
  return {out, sums};
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def("linear_transpose(Tensor x, bool with_sums) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) { m.impl("linear_transpose", TORCH_BOX(&maskdm::linear_transpose)); }
