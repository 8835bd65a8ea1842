"""lamb_ema on the compiled kernels of csrc/lamb_ema."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.lamb_ema import fakes

if backend.has_native():
    _step = torch.ops.maskdm_fast.lamb_ema_.default
    torch.library.register_fake("maskdm_fast::lamb_ema_", fakes.lamb_ema_)


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
    min_ndim: int,
    lr_tensor: Tensor | None,
    step_tensor: Tensor | None,
    ema_decay_tensor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    numbers = (grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay, min_ndim)
    in_memory = (lr_tensor, step_tensor, ema_decay_tensor, found_inf)
    if any(tensor is not None for tensor in in_memory):
        numbers += in_memory
    _step(params, grads, exp_avgs, exp_avg_sqs, emas, copies, *numbers)
