"""Shapes and dtypes of what the operators of lamb_ema return, for torch.compile; on every backend."""

from torch import Tensor


def lamb_ema_(
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
    lr_tensor: Tensor | None = None,
    step_tensor: Tensor | None = None,
    ema_decay_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Nothing: all of it happens in place."""
