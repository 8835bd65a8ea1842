"""sid_loss on the compiled kernels of csrc/sid_loss."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.sid_loss import fakes

if backend.has_native():
    _forward = torch.ops.maskdm_fast.sid_loss_fwd.default
    _backward = torch.ops.maskdm_fast.sid_loss_bwd.default
    torch.library.register_fake("maskdm_fast::sid_loss_fwd", fakes.sid_loss_fwd)
    torch.library.register_fake("maskdm_fast::sid_loss_bwd", fakes.sid_loss_bwd)


def forward(
    generated: Tensor,
    teacher: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    xt: Tensor | None,
    alpha_t: Tensor | None,
    alpha: float,
    normalised: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(generated, teacher, fake, weight, xt, alpha_t, alpha, normalised, mean)


def backward(
    grad_loss: Tensor,
    scale: Tensor,
    generated: Tensor,
    teacher: Tensor,
    fake: Tensor,
    alpha: float,
    mean: bool,
    to_generated: bool,
    to_teacher: bool,
    to_fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad_loss, scale, generated, teacher, fake, alpha, mean, to_generated, to_teacher, to_fake)
