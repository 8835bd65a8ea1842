#include <tuple>
#include <vector>

#include "common/bind.h"
#include "sid_loss/schema.h"
#include "sid_loss/sid_loss.h"
#include "sid_loss/sid_loss_bind.h"

namespace maskdm {
namespace {

constexpr double kNanosecondsPerValue = 0.3;

template <class F>
void for_each_image(const SidImages& images, const F& f) {
  parallel(images.num_images, static_cast<double>(images.count) * kNanosecondsPerValue, f);
}

// One number an image, 1 / x or x, in double.
std::vector<double> numbers_of(DType dtype, const char* values, int64_t count, bool inverse) {
  std::vector<double> numbers(count);
  for (int64_t b = 0; b < count; ++b) {
    const double number = read_accumulated(dtype, values, b);
    numbers[b] = inverse ? 1.0 / number : number;
  }
  return numbers;
}

std::tuple<Tensor, Tensor> sid_loss_fwd(Tensor generated, Tensor teacher, Tensor fake, std::optional<Tensor> weight,
                                        std::optional<Tensor> xt, std::optional<Tensor> alpha_t, double alpha,
                                        bool normalised, bool mean) {
  const SidImages images = sid_images_of(generated, teacher, fake, alpha);
  const int64_t num_images = images.num_images;
  std::vector<double> inverse;
  if (alpha_t.has_value()) inverse = numbers_of(images.dtype, bytes_of(*alpha_t), num_images, true);
  std::vector<SidSums> sums(num_images);
  for_each_image(images, [&](int64_t begin, int64_t end) {
    MASKDM_KERNELS(sid_loss_kernels)
        .sums(images, data_of<char>(xt), inverse.empty() ? nullptr : inverse.data(), sums.data(), begin, end);
  });

  auto [loss, scale] = sid_results(generated, images, mean);
  char *losses = mutable_bytes_of(loss), *scales = mutable_bytes_of(scale);
  const char* weights = data_of<char>(weight);
  double total = 0;
  for (int64_t b = 0; b < num_images; ++b) {
    const double weight_of_b = weights != nullptr ? read_accumulated(images.dtype, weights, b) : 1.0;
    const SidLoss of_b = MASKDM_ISA::sid_loss_of(sums[b], static_cast<double>(images.count), weight_of_b, normalised);
    write_accumulated(images.dtype, scales, b, of_b.scale);
    total += of_b.loss;
    if (!mean) write_accumulated(images.dtype, losses, b, of_b.loss);
  }
  if (mean) write_accumulated(images.dtype, losses, 0, total / static_cast<double>(num_images));
  return {loss, scale};
}

// grad_loss [] with `mean`, else [B], any stride
std::tuple<Tensor, Tensor, Tensor> sid_loss_bwd(Tensor grad_loss, Tensor scale, Tensor generated, Tensor teacher,
                                                Tensor fake, double alpha, bool mean, bool to_generated,
                                                bool to_teacher, bool to_fake) {
  const SidImages images = sid_images_of(generated, teacher, fake, alpha);
  std::vector<double> factor = numbers_of(images.dtype, bytes_of(scale), images.num_images, false);
  const double shares = static_cast<double>(images.count * (mean ? images.num_images : 1));
  const int64_t stride = mean ? 0 : grad_loss.stride(0);
  for (int64_t b = 0; b < images.num_images; ++b) {
    if (factor[b] != 0.0) factor[b] *= read_accumulated(images.dtype, bytes_of(grad_loss), b * stride) / shares;
  }
  auto grads = SidGradientTensors(generated, to_generated, to_teacher, to_fake);
  const SidGradients to = grads.pointers();
  for_each_image(images, [&](int64_t begin, int64_t end) {
    MASKDM_KERNELS(sid_loss_kernels).gradients(images, factor.data(), to, begin, end);
  });
  return grads.all();
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(maskdm::kSidLossFwdSchema);
  m.def(maskdm::kSidLossBwdSchema);
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) {
  m.impl("sid_loss_fwd", TORCH_BOX(&maskdm::sid_loss_fwd));
  m.impl("sid_loss_bwd", TORCH_BOX(&maskdm::sid_loss_bwd));
}
