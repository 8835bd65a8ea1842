#include "adamw_ema/adamw_ema.h"

#include <cmath>

#include "common/bind.h"

namespace maskdm {
namespace {

constexpr int64_t kChunk = 1 << 15;  // parameters per unit of work: large tensors are shared between threads

using Tensors = std::vector<Tensor>;

// Lists of equal length, contiguous; copies is empty or of that length
void adamw_ema_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas, Tensors copies,
                std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, double ema_decay) {
  const char* op = "adamw_ema";
  AdamHyper hyper{lr, beta1, beta2, eps, weight_decay, ema_decay, 0, 0, 1};
  hyper.step_size = lr / (1 - std::pow(beta1, static_cast<double>(step)));
  hyper.bias2_sqrt = std::sqrt(1 - std::pow(beta2, static_cast<double>(step)));
  if (grad_scale.has_value()) hyper.grad_scale = *data_of<float>(grad_scale);

  struct Chunk {
    const AdamTensor* tensor;
    int64_t begin, end;
  };
  std::vector<AdamTensor> tensors(params.size());
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < params.size(); ++i) {
    AdamTensor& t = tensors[i];
    t.dtype = dtype_of(op, params[i]);
    t.param = mutable_bytes_of(params[i]), t.grad = bytes_of(grads[i]);
    t.m = mutable_bytes_of(exp_avgs[i]), t.v = mutable_bytes_of(exp_avg_sqs[i]), t.ema = mutable_bytes_of(emas[i]);
    t.copy = copies.empty() ? nullptr : mutable_bytes_of(copies[i]);
    t.copy_dtype = copies.empty() ? DType::f32 : dtype_of(op, copies[i]);
    const int64_t count = params[i].numel();
    for (int64_t begin = 0; begin < count; begin += kChunk) {
      chunks.push_back({&t, begin, std::min(begin + kChunk, count)});
    }
  }
  const auto& kernels = MASKDM_KERNELS(adamw_ema_kernels);
  parallel(static_cast<int64_t>(chunks.size()), kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.run(*chunks[i].tensor, hyper, chunks[i].begin, chunks[i].end);
  });
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast, m) {
  m.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step, float ema_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast, CPU, m) { m.impl("adamw_ema_", TORCH_BOX(&maskdm::adamw_ema_)); }
