"""Ground truth of lamb_ema in plain PyTorch."""

import torch
from torch import Tensor


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
    rate = lr if lr_tensor is None else lr_tensor.double()
    count = step if step_tensor is None else step_tensor.double()
    follow = 1.0 - (ema_decay if ema_decay_tensor is None else ema_decay_tensor)
    bias1, bias2_sqrt = 1.0 - beta1**count, (1.0 - beta2**count) ** 0.5

    def write(out: Tensor, new: Tensor) -> None:
        out.copy_(new if found_inf is None else torch.where(found_inf != 0, out, new.to(out.dtype)))

    for index, (param, grad, m, v, ema) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, emas, strict=True)):
        g, p = grad.to(m.dtype), param.to(m.dtype)
        if grad_scale is not None:
            g = g * grad_scale.to(m.dtype)
        write(m, beta1 * m + (1.0 - beta1) * g)
        write(v, beta2 * v + (1.0 - beta2) * g * g)
        update = (m / bias1) / (v.sqrt() / bias2_sqrt + eps) + weight_decay * p
        p_norm, update_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
        adapted = (p_norm != 0) & (update_norm != 0) & (param.dim() >= min_ndim)
        new = p - rate * torch.where(adapted, p_norm / update_norm, 1.0) * update
        write(ema, ema + (new - ema) * follow)
        write(param, new)
        if copies:
            write(copies[index], param)
