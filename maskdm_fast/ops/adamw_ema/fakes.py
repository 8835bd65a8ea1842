"""Shapes and dtypes of what the operators of adamw_ema return, for torch.compile; on every backend."""

import torch
from torch import Tensor


def global_norm(tensors: list[Tensor]) -> Tensor:
    """A scalar, float64 if one of `tensors` is, else float32."""
    in_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if in_double else torch.float32)


def adamw_ema_(
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
    lr_tensor: Tensor | None = None,
    step_tensor: Tensor | None = None,
    ema_decay_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Nothing: all of it happens in place."""
