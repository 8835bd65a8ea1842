#include "masked_dsm_loss/masked_dsm_loss.h"

#include <vector>

#include "common/bind.h"
#include "masked_dsm_loss/schema.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "masked_dsm_loss";
constexpr double kNanosecondsPerValue = 0.2;

// pred, target [B, K, D] or packed [T, D], contiguous, of one dtype
LossArgs arguments(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& cu_seqlens, int64_t kind,
                   double delta) {
  LossArgs args{};
  args.dtype = dtype_of(kOp, pred);
  args.segments = segments_of(kOp, pred, cu_seqlens);
  args.width = pred.size(pred.dim() - 1);
  args.kind = static_cast<int>(kind), args.delta = delta;
  args.pred = bytes_of(pred), args.target = bytes_of(target);
  return args;
}

void run(void (*kernel)(const LossArgs&, int64_t, int64_t), const LossArgs& args, const Tensor& pred) {
  const double values = static_cast<double>(pred.numel()) / std::max<int64_t>(1, args.segments.num_images);
  parallel(args.segments.num_images, values * kNanosecondsPerValue,
           [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// weight [B] -> loss [] with `mean`, else [B]
Tensor masked_dsm_loss_fwd(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> cu_seqlens,
                           int64_t kind, double delta, bool mean) {
  using torch::headeronly::ScalarType;
  LossArgs args = arguments(pred, target, cu_seqlens, kind, delta);
  const int64_t num_images = args.segments.num_images;
  const auto dtype = args.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  std::vector<double> raw(num_images);
  args.raw = raw.data();
  run(MASKDM_KERNELS(masked_dsm_loss_kernels).value, args, pred);

  Tensor loss = mean ? torch::stable::new_empty(pred, {}, dtype) : torch::stable::new_empty(pred, {num_images}, dtype);
  char* out = mutable_bytes_of(loss);
  const char* weights = data_of<char>(weight);
  double sum = 0;
  for (int64_t b = 0; b < num_images; ++b) {
    if (weights != nullptr) raw[b] *= read_accumulated(args.dtype, weights, b);
    sum += raw[b];
    if (!mean) write_accumulated(args.dtype, out, b, raw[b]);
  }
  if (mean) write_accumulated(args.dtype, out, 0, sum / static_cast<double>(num_images));
  return loss;
}

// grad_loss [] with `mean`, else [B], any stride -> grad_pred like pred
Tensor masked_dsm_loss_bwd(Tensor grad_loss, Tensor pred, Tensor target, std::optional<Tensor> weight,
                           std::optional<Tensor> cu_seqlens, int64_t kind, double delta, bool mean) {
  LossArgs args = arguments(pred, target, cu_seqlens, kind, delta);
  const int64_t num_images = args.segments.num_images;
  const char *upstream = bytes_of(grad_loss), *weights = data_of<char>(weight);
  const int64_t stride = mean ? 0 : grad_loss.stride(0);
  std::vector<double> scale(num_images);
  for (int64_t b = 0; b < num_images; ++b) {
    const int64_t tokens =
        MASKDM_ISA::segment_begin(args.segments, b + 1) - MASKDM_ISA::segment_begin(args.segments, b);
    const double shares = static_cast<double>(std::max<int64_t>(1, tokens * args.width) * (mean ? num_images : 1));
    scale[b] = read_accumulated(args.dtype, upstream, b * stride) / shares;
    if (weights != nullptr) scale[b] *= read_accumulated(args.dtype, weights, b);
  }
  Tensor grad = torch::stable::empty_like(pred);
  args.scale = scale.data(), args.grad = mutable_bytes_of(grad);
  run(MASKDM_KERNELS(masked_dsm_loss_kernels).gradient, args, pred);
  return grad;
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(maskdm::kMaskedDsmLossFwdSchema);
  m.def(maskdm::kMaskedDsmLossBwdSchema);
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("masked_dsm_loss_fwd", TORCH_BOX(&maskdm::masked_dsm_loss_fwd));
  m.impl("masked_dsm_loss_bwd", TORCH_BOX(&maskdm::masked_dsm_loss_bwd));
}
