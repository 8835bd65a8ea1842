#include "gather_tokens/gather_tokens.h"

#include <tuple>

#include "common/bind.h"

namespace maskdm {
namespace {

constexpr double kNanosecondsPerByte = 0.1;

// Uninitialised [B, K, D] for ids_keep [B, K], or [T, D] for [T].
Tensor rows_for(const Tensor& ids_keep, const Tensor& like, int64_t width) {
  return ids_keep.dim() == 1 ? torch::stable::new_empty(like, {ids_keep.size(0), width})
                             : torch::stable::new_empty(like, {ids_keep.size(0), ids_keep.size(1), width});
}

// x [B, N, D] with unit stride in D; ids_keep [B, K] or [T], contiguous -> [B, K, D] or [T, D]
Tensor gather_tokens_fwd(Tensor x, Tensor ids_keep, std::optional<Tensor> cu_seqlens) {
  const char* op = "gather_tokens";
  const int64_t num_tokens = x.size(1), width = x.size(2), item = x.element_size();
  const Segments segments = segments_of(op, ids_keep, cu_seqlens);
  const auto* ids = static_cast<const int64_t*>(ids_keep.const_data_ptr());
  check_ids(op, ids, segments, num_tokens, /*distinct=*/true);

  Tensor out = rows_for(ids_keep, x, width);
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

// grad [B, N, D] with unit stride in D -> grad_x [B, K, D] or [T, D], grad_base [B, N, D]; empty [0] where not asked for
std::tuple<Tensor, Tensor> scatter_tokens_bwd(Tensor grad, Tensor ids_keep, std::optional<Tensor> cu_seqlens, bool to_x,
                                              bool to_base) {
  const char* op = "scatter_tokens";
  const int64_t num_images = grad.size(0), num_tokens = grad.size(1), width = grad.size(2), item = grad.element_size();
  const Segments segments = segments_of(op, ids_keep, cu_seqlens);
  const auto* ids = static_cast<const int64_t*>(ids_keep.const_data_ptr());
  check_ids(op, ids, segments, num_tokens, /*distinct=*/true);

  Tensor grad_x = to_x ? rows_for(ids_keep, grad, width) : torch::stable::new_empty(grad, {0});
  Tensor grad_base =
      to_base ? torch::stable::new_empty(grad, {num_images, num_tokens, width}) : torch::stable::new_empty(grad, {0});
  const int64_t image_bytes = grad.stride(0) * item, token_bytes = grad.stride(1) * item, row_bytes = width * item;
  const char* rows = bytes_of(grad);
  const GatherArgs gather{segments, num_tokens,  row_bytes,   ids,
                          rows,     image_bytes, token_bytes, mutable_bytes_of(grad_x)};
  const ScatterArgs scatter{
      segments, num_tokens, row_bytes, ids, nullptr, rows, image_bytes, token_bytes, mutable_bytes_of(grad_base)};
  const auto& kernels = MASKDM_KERNELS(gather_tokens_kernels);
  parallel(num_images, static_cast<double>(num_tokens * row_bytes) * kNanosecondsPerByte,
           [&](int64_t begin, int64_t end) {
             Scratch source(num_tokens * sizeof(int64_t));
             for (int64_t b = begin; b < end; ++b) {
               if (to_x) kernels.gather(gather, b, b + 1);
               if (to_base) kernels.scatter(scatter, reinterpret_cast<int64_t*>(source.get()), b, b + 1);
             }
           });
  return {grad_x, grad_base};
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def("gather_tokens_fwd(Tensor x, Tensor ids_keep, Tensor? cu_seqlens) -> Tensor");
  m.def("scatter_tokens_fwd(Tensor x, Tensor ids_keep, Tensor? base, Tensor? cu_seqlens, SymInt num_tokens) -> Tensor");
  m.def(
      "scatter_tokens_bwd(Tensor grad, Tensor ids_keep, Tensor? cu_seqlens, bool to_x, bool to_base) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("gather_tokens_fwd", TORCH_BOX(&maskdm::gather_tokens_fwd));
  m.impl("scatter_tokens_fwd", TORCH_BOX(&maskdm::scatter_tokens_fwd));
  m.impl("scatter_tokens_bwd", TORCH_BOX(&maskdm::scatter_tokens_bwd));
}
