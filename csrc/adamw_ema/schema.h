// The operators of adamw_ema, for every device. lr_tensor (float32), step_tensor (int64) and ema_decay_tensor (float64) are
// scalars on the device of the parameters; where one is given, it is read there and the number of that name is not used.
// Where found_inf (float32, there too) is not 0, the step writes nothing. copies may be empty, exp_avgs too if beta1 is 0,
// and emas too; then ema_decay is not used.
#pragma once

namespace maskdm {

constexpr const char* kAdamwEmaSchema =
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step, float ema_decay, Tensor? lr_tensor=None, Tensor? step_tensor=None, "
    "Tensor? ema_decay_tensor=None, Tensor? found_inf=None) -> ()";
constexpr const char* kGlobalNormSchema = "global_norm(Tensor[] tensors) -> Tensor";

}  // namespace maskdm
