// The operators of sid_loss, for every device; the gradients that are not asked for are empty.
#pragma once

namespace maskdm {

constexpr const char* kSidLossFwdSchema =
    "sid_loss_fwd(Tensor generated, Tensor teacher, Tensor fake, Tensor? weight, Tensor? xt, Tensor? alpha_t, "
    "float alpha, bool normalised, bool mean) -> (Tensor, Tensor)";
constexpr const char* kSidLossBwdSchema =
    "sid_loss_bwd(Tensor grad_loss, Tensor scale, Tensor generated, Tensor teacher, Tensor fake, float alpha, "
    "bool mean, bool to_generated, bool to_teacher, bool to_fake) -> (Tensor, Tensor, Tensor)";

}  // namespace maskdm
