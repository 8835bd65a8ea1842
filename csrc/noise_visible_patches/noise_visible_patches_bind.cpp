#include "noise_visible_patches/noise_visible_patches.h"

#include <tuple>

#include "common/bind.h"

namespace maskdm {
namespace {

// images [B, C, height, width], or [B, height, width, C] with channels_last, any strides -> xt, target [B, K, P P C]
std::tuple<Tensor, Tensor> noise_visible_patches_fwd(Tensor images, std::optional<Tensor> ids_keep, Tensor alpha,
                                                     Tensor sigma, Tensor slots, Tensor step,
                                                     std::optional<Tensor> flip, int64_t patch_size, bool channels_last,
                                                     int64_t prediction, int64_t seed,
                                                     torch::headeronly::ScalarType out_dtype) {
  const char* op = "noise_visible_patches";
  const int y = channels_last ? 1 : 2, x = channels_last ? 2 : 3, c = channels_last ? 3 : 1;
  const int64_t num_images = images.size(0), channels = images.size(c);
  const int64_t patches_per_row = images.size(x) / patch_size;
  const int64_t num_patches = images.size(y) / patch_size * patches_per_row;
  const int64_t visible = ids_keep.has_value() ? ids_keep->size(1) : num_patches;
  const auto* ids = data_of<int64_t>(ids_keep);
  if (ids != nullptr) check_ids(op, ids, {num_images, visible, nullptr}, num_patches, /*distinct=*/false);

  Tensor xt = torch::stable::new_empty(images, {num_images, visible, patch_size * patch_size * channels}, out_dtype);
  Tensor target = torch::stable::empty_like(xt);
  NoiseArgs args{};
  args.image_dtype = dtype_of(op, images);
  args.out_dtype = dtype_of(op, xt);
  args.images = bytes_of(images);
  args.stride_image = images.stride(0), args.stride_channel = images.stride(c);
  args.stride_y = images.stride(y), args.stride_x = images.stride(x);
  args.channels = channels, args.patch_size = patch_size;
  args.patches_per_row = patches_per_row, args.visible = visible;
  args.ids = ids;
  args.alpha = bytes_of(alpha), args.sigma = bytes_of(sigma);
  args.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  args.flip = data_of<bool>(flip);
  args.step = *static_cast<const int64_t*>(step.const_data_ptr());
  args.seed = seed;
  args.prediction = static_cast<int>(prediction);
  args.xt = mutable_bytes_of(xt), args.target = mutable_bytes_of(target);

  const auto& kernels = MASKDM_KERNELS(noise_visible_patches_kernels);
  parallel(num_images * visible, 1.5 * patch_size * patch_size * channels, [&](int64_t begin, int64_t end) {
    Scratch scratch(kernels.scratch_bytes(args));
    kernels.run(args, scratch.get(), begin, end);
  });
  return {xt, target};
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(
      "noise_visible_patches_fwd(Tensor images, Tensor? ids_keep, Tensor alpha, Tensor sigma, Tensor slots, "
      "Tensor step, Tensor? flip, int patch_size, bool channels_last, int prediction, int seed, ScalarType out_dtype) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("noise_visible_patches_fwd", TORCH_BOX(&maskdm::noise_visible_patches_fwd));
}
