#include "masked_dsm_loss/masked_dsm_loss.h"

#include <tuple>

#include "common/bind.h"

namespace maskdm {
namespace {

// pred, target [B, K, D] or packed [T, D], contiguous, of one dtype; weight [B] -> raw [B], grad like pred (or empty [0])
std::tuple<Tensor, Tensor> masked_dsm_loss_fwd(Tensor pred, Tensor target, std::optional<Tensor> weight,
                                               std::optional<Tensor> cu_seqlens, int64_t kind, double delta,
                                               bool with_grad) {
  using torch::headeronly::ScalarType;
  const char* op = "masked_dsm_loss";
  LossArgs args{};
  args.dtype = dtype_of(op, pred);
  args.segments = segments_of(op, pred, cu_seqlens);
  args.width = pred.size(pred.dim() - 1);
  args.kind = static_cast<int>(kind), args.delta = delta;
  args.pred = bytes_of(pred), args.target = bytes_of(target);
  args.weight = data_of<char>(weight);
  Tensor raw = torch::stable::new_empty(pred, {args.segments.num_images},
                                        args.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor grad = with_grad ? torch::stable::empty_like(pred) : torch::stable::new_empty(pred, {0});
  args.raw = mutable_bytes_of(raw), args.grad = with_grad ? mutable_bytes_of(grad) : nullptr;

  const auto& kernels = MASKDM_KERNELS(masked_dsm_loss_kernels);
  const double values = static_cast<double>(pred.numel()) / std::max<int64_t>(1, args.segments.num_images);
  parallel(args.segments.num_images, values, [&](int64_t begin, int64_t end) { kernels.run(args, begin, end); });
  return {raw, grad};
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(
      "masked_dsm_loss_fwd(Tensor pred, Tensor target, Tensor? weight, Tensor? cu_seqlens, int kind, float delta, "
      "bool with_grad) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("masked_dsm_loss_fwd", TORCH_BOX(&maskdm::masked_dsm_loss_fwd));
}
