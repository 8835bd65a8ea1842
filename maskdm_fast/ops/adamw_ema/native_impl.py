"""adamw_ema on the compiled kernels of csrc/adamw_ema."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema import fakes

if backend.has_native():
    _step = torch.ops.maskdm_fast.adamw_ema_.default
    _norm = torch.ops.maskdm_fast.global_norm.default
    torch.library.register_fake("maskdm_fast::adamw_ema_", fakes.adamw_ema_)
    torch.library.register_fake("maskdm_fast::global_norm", fakes.global_norm)


def global_norm(tensors: list[Tensor]) -> Tensor:
    return _norm([tensor.contiguous() for tensor in tensors])


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
    lr_tensor: Tensor | None,
    step_tensor: Tensor | None,
    ema_decay_tensor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    numbers = (grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay)
    in_memory = (lr_tensor, step_tensor, ema_decay_tensor, found_inf)
    if any(tensor is not None for tensor in in_memory):
        numbers += in_memory
    _step(params, grads, exp_avgs, exp_avg_sqs, emas, copies, *numbers)
