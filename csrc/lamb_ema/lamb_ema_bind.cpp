#include "lamb_ema/lamb_ema.h"

#include "common/adam_bind.h"
#include "lamb_ema/schema.h"

namespace maskdm {
namespace {

constexpr const char* kOp = "lamb_ema";

void lamb_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas, Tensors copies,
               std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
               int64_t step, double ema_decay, int64_t min_ndim, std::optional<Tensor> lr_tensor,
               std::optional<Tensor> step_tensor, std::optional<Tensor> ema_decay_tensor,
               std::optional<Tensor> found_inf) {
  const auto tensors = adam_tensors_of(kOp, Slots::all, params, grads, exp_avgs, exp_avg_sqs, emas, copies);
  const AdamArguments arguments{grad_scale,       lr,       beta1,     beta2,     eps,
                                weight_decay,     step,     ema_decay, lr_tensor, step_tensor,
                                ema_decay_tensor, found_inf};
  if (arguments.skipped()) return;
  const AdamHyper hyper = arguments.hyper();
  const auto& kernels = MASKDM_KERNELS(lamb_ema_kernels);
  const auto chunks = chunks_of(params);
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  std::vector<LambSums> parts(chunks.size());
  parallel(num_chunks, kAdamChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = kernels.update_moments(tensors[chunks[i].tensor], hyper, chunks[i].begin, chunks[i].end);
    }
  });
  // Chunk after chunk, whichever thread took them.
  std::vector<LambSums> sums(params.size());
  for (size_t i = 0; i < chunks.size(); ++i) {
    sums[chunks[i].tensor].param += parts[i].param;
    sums[chunks[i].tensor].update += parts[i].update;
  }
  parallel(num_chunks, kAdamChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t index = chunks[i].tensor;
      const double trust = lamb_trust(sums[index], params[index].dim() >= min_ndim);
      kernels.apply(tensors[index], hyper, trust, chunks[i].begin, chunks[i].end);
    }
  });
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) { m.def(maskdm::kLambEmaSchema); }

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) { m.impl("lamb_ema_", TORCH_BOX(&maskdm::lamb_ema_)); }
