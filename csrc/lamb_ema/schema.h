// The operator of lamb_ema, for every device; tensors among the numbers as in adamw_ema/schema.h. A parameter of fewer
// than min_ndim dimensions is not adapted.
#pragma once

namespace maskdm {

constexpr const char* kLambEmaSchema =
    "lamb_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step, float ema_decay, int min_ndim, Tensor? lr_tensor=None, Tensor? step_tensor=None, "
    "Tensor? ema_decay_tensor=None, Tensor? found_inf=None) -> ()";

}  // namespace maskdm
