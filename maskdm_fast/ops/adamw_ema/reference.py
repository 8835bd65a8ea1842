"""Ground truth of adamw_ema in plain PyTorch."""

import torch
from torch import Tensor


def global_norm(tensors: list[Tensor]) -> Tensor:
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]).norm()


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
    rate = lr if lr_tensor is None else lr_tensor.double()
    count = step if step_tensor is None else step_tensor.double()
    follow = 1.0 - (ema_decay if ema_decay_tensor is None else ema_decay_tensor)
    bias1, bias2_sqrt = 1.0 - beta1**count, (1.0 - beta2**count) ** 0.5

    def write(out: Tensor, new: Tensor) -> None:
        out.copy_(new if found_inf is None else torch.where(found_inf != 0, out, new.to(out.dtype)))

    for index, (param, grad, v) in enumerate(zip(params, grads, exp_avg_sqs, strict=True)):
        g = m = grad.to(v.dtype)
        if grad_scale is not None:
            g = m = g * grad_scale.to(v.dtype)
        if exp_avgs:
            m = exp_avgs[index]
            write(m, beta1 * m + (1.0 - beta1) * g)
        write(v, beta2 * v + (1.0 - beta2) * g * g)
        update = m / (v.sqrt() / bias2_sqrt + eps)
        new = param.to(v.dtype) * (1.0 - rate * weight_decay) - (rate / bias1) * update
        if emas:
            write(emas[index], emas[index] + (new - emas[index]) * follow)
        write(param, new)
        if copies:
            write(copies[index], param)
