#include "noise_visible_patches/noise_visible_patches.h"

#include <tuple>

#include "common/bind.h"

namespace maskdm {
namespace {

// images [B, C, height, width], or [B, height, width, C] with channels_last, any strides; ids_keep [B, K] or [T]
// -> xt, target [B, K, P P C] or [T, P P C]
std::tuple<Tensor, Tensor> noise_visible_patches_fwd(Tensor images, std::optional<Tensor> ids_keep,
                                                     std::optional<Tensor> cu_seqlens, Tensor alpha, Tensor sigma,
                                                     Tensor eps_scale, Tensor x0_scale, Tensor slots, Tensor step,
                                                     std::optional<Tensor> flip, int64_t patch_size, bool channels_last,
                                                     int64_t seed, torch::headeronly::ScalarType out_dtype) {
  const char* op = "noise_visible_patches";
  const int y = channels_last ? 1 : 2, x = channels_last ? 2 : 3, c = channels_last ? 3 : 1;
  const int64_t num_images = images.size(0), channels = images.size(c);
  const int64_t patches_per_row = images.size(x) / patch_size;
  const int64_t num_patches = images.size(y) / patch_size * patches_per_row;
  const int64_t values = patch_size * patch_size * channels;
  const auto* ids = data_of<int64_t>(ids_keep);
  Segments segments{num_images, num_patches, nullptr};
  if (ids_keep.has_value()) {
    segments = segments_of(op, *ids_keep, cu_seqlens);
    check_ids(op, ids, segments, num_patches, /*distinct=*/false);
  }
  const int64_t num_visible = ids_keep.has_value() ? ids_keep->numel() : num_images * num_patches;

  Tensor xt = cu_seqlens.has_value()
                  ? torch::stable::new_empty(images, {num_visible, values}, out_dtype)
                  : torch::stable::new_empty(images, {num_images, segments.tokens_per_image, values}, out_dtype);
  Tensor target = torch::stable::empty_like(xt);
  NoiseArgs args{};
  args.image_dtype = dtype_of(op, images);
  args.out_dtype = dtype_of(op, xt);
  args.images = bytes_of(images);
  args.stride_image = images.stride(0), args.stride_channel = images.stride(c);
  args.stride_y = images.stride(y), args.stride_x = images.stride(x);
  args.channels = channels, args.patch_size = patch_size;
  args.patches_per_row = patches_per_row, args.segments = segments;
  args.ids = ids;
  args.alpha = bytes_of(alpha), args.sigma = bytes_of(sigma);
  args.eps_scale = bytes_of(eps_scale), args.x0_scale = bytes_of(x0_scale);
  args.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  args.flip = data_of<bool>(flip);
  args.step = *static_cast<const int64_t*>(step.const_data_ptr());
  args.seed = seed;
  args.xt = mutable_bytes_of(xt), args.target = mutable_bytes_of(target);

  const auto& kernels = MASKDM_KERNELS(noise_visible_patches_kernels);
  parallel(num_visible, 1.5 * values, [&](int64_t begin, int64_t end) {
    Scratch scratch(kernels.scratch_bytes(args));
    kernels.run(args, scratch.get(), begin, end);
  });
  return {xt, target};
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(
      "noise_visible_patches_fwd(Tensor images, Tensor? ids_keep, Tensor? cu_seqlens, Tensor alpha, Tensor sigma, "
      "Tensor eps_scale, Tensor x0_scale, Tensor slots, Tensor step, Tensor? flip, int patch_size, "
      "bool channels_last, int seed, ScalarType out_dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("noise_visible_patches_fwd", TORCH_BOX(&maskdm::noise_visible_patches_fwd));
}
