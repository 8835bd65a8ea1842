#include "gather_tokens/gather_tokens.h"

#include "common/bind.h"

namespace maskdm {
namespace {

constexpr double kNanosecondsPerByte = 0.1;

// x [B, N, D] with unit stride in D; ids_keep [B, K] or [T], contiguous -> [B, K, D] or [T, D]
Tensor gather_tokens_fwd(Tensor x, Tensor ids_keep, std::optional<Tensor> cu_seqlens) {
  const char* op = "gather_tokens";
  const int64_t num_tokens = x.size(1), width = x.size(2), item = x.element_size();
  const Segments segments = segments_of(op, ids_keep, cu_seqlens);
  const auto* ids = static_cast<const int64_t*>(ids_keep.const_data_ptr());
  check_ids(op, ids, segments, num_tokens, /*distinct=*/true);

  Tensor out = cu_seqlens.has_value() ? torch::stable::new_empty(x, {ids_keep.size(0), width})
                                      : torch::stable::new_empty(x, {ids_keep.size(0), ids_keep.size(1), width});
  GatherArgs args{segments, num_tokens, width * item, ids, bytes_of(x), 0, 0, mutable_bytes_of(out)};
  args.x_image_bytes = x.stride(0) * item;
  args.x_token_bytes = x.stride(1) * item;
  const auto& kernels = MASKDM_KERNELS(gather_tokens_kernels);
  const double bytes = static_cast<double>(out.numel() * item) / std::max<int64_t>(1, segments.num_images);
  parallel(segments.num_images, bytes * kNanosecondsPerByte,
           [&](int64_t begin, int64_t end) { kernels.gather(args, begin, end); });
  return out;
}

// x [B, K, D] or [T, D], contiguous; base [B, N, D] with unit stride in D -> [B, N, D]
Tensor scatter_tokens_fwd(Tensor x, Tensor ids_keep, std::optional<Tensor> base, std::optional<Tensor> cu_seqlens,
                          int64_t num_tokens) {
  const char* op = "scatter_tokens";
  const int64_t width = x.size(x.dim() - 1), item = x.element_size();
  const Segments segments = segments_of(op, ids_keep, cu_seqlens);
  const auto* ids = static_cast<const int64_t*>(ids_keep.const_data_ptr());
  check_ids(op, ids, segments, num_tokens, /*distinct=*/true);

  Tensor out = torch::stable::new_empty(x, {segments.num_images, num_tokens, width});
  ScatterArgs args{segments, num_tokens, width * item, ids, bytes_of(x), nullptr, 0, 0, mutable_bytes_of(out)};
  if (base.has_value()) {
    args.base = bytes_of(*base);
    args.base_image_bytes = base->stride(0) * item;
    args.base_token_bytes = base->stride(1) * item;
  }
  const auto& kernels = MASKDM_KERNELS(gather_tokens_kernels);
  parallel(segments.num_images, static_cast<double>(num_tokens * width * item) * kNanosecondsPerByte,
           [&](int64_t begin, int64_t end) {
             Scratch source(num_tokens * sizeof(int64_t));
             kernels.scatter(args, reinterpret_cast<int64_t*>(source.get()), begin, end);
           });
  return out;
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def("gather_tokens_fwd(Tensor x, Tensor ids_keep, Tensor? cu_seqlens) -> Tensor");
  m.def("scatter_tokens_fwd(Tensor x, Tensor ids_keep, Tensor? base, Tensor? cu_seqlens, SymInt num_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("gather_tokens_fwd", TORCH_BOX(&maskdm::gather_tokens_fwd));
  m.impl("scatter_tokens_fwd", TORCH_BOX(&maskdm::scatter_tokens_fwd));
}
