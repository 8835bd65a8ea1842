#include "common/bind_cuda.h"
#include "sid_loss/sid_loss.h"
#include "sid_loss/sid_loss_bind.h"

namespace maskdm {
namespace {

using torch::headeronly::ScalarType;

SidImages images_of(const Tensor& generated, const Tensor& teacher, const Tensor& fake, double alpha) {
  const SidImages images = sid_images_of(generated, teacher, fake, alpha);
  if (images.dtype == DType::f64) fail("sid_loss: the CUDA kernels have no float64");
  return images;
}

// weight, alpha_t [B] float32
std::tuple<Tensor, Tensor> sid_loss_fwd(Tensor generated, Tensor teacher, Tensor fake, std::optional<Tensor> weight,
                                        std::optional<Tensor> xt, std::optional<Tensor> alpha_t, double alpha,
                                        bool normalised, bool mean) {
  SidForwardCuda args{};
  args.images = images_of(generated, teacher, fake, alpha);
  args.xt = data_of<char>(xt), args.alpha_t = data_of<float>(alpha_t), args.weight = data_of<float>(weight);
  args.normalised = normalised, args.mean = mean;
  const CudaScope scope(generated);
  Tensor partial = torch::stable::new_empty(generated, {2 * sid_parts(args.images)}, ScalarType::Double);
  auto [loss, scale] = sid_results(generated, args.images, mean);
  args.partial = reinterpret_cast<SidSums*>(mutable_bytes_of(partial));
  args.loss = reinterpret_cast<float*>(mutable_bytes_of(loss));
  args.scale = reinterpret_cast<float*>(mutable_bytes_of(scale));
  sid_loss_forward_cuda(args, scope.stream());
  return {loss, scale};
}

// grad_loss [] with `mean`, else [B], any stride
std::tuple<Tensor, Tensor, Tensor> sid_loss_bwd(Tensor grad_loss, Tensor scale, Tensor generated, Tensor teacher,
                                                Tensor fake, double alpha, bool mean, bool to_generated,
                                                bool to_teacher, bool to_fake) {
  SidBackwardCuda args{};
  args.images = images_of(generated, teacher, fake, alpha);
  args.grad_loss = reinterpret_cast<const float*>(bytes_of(grad_loss));
  args.grad_loss_stride = mean ? 0 : grad_loss.stride(0);
  args.scale = reinterpret_cast<const float*>(bytes_of(scale));
  args.mean = mean;
  const CudaScope scope(generated);
  auto grads = SidGradientTensors(generated, to_generated, to_teacher, to_fake);
  args.grads = grads.pointers();
  sid_loss_backward_cuda(args, scope.stream());
  return grads.all();
}

}  // namespace
}  // namespace maskdm

MASKDM_CUDA_LIBRARY(m) {
  m.impl("sid_loss_fwd", TORCH_BOX(&maskdm::sid_loss_fwd));
  m.impl("sid_loss_bwd", TORCH_BOX(&maskdm::sid_loss_bwd));
}
