"""adamw_ema on the compiled kernels of csrc/adamw_ema."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend

if backend.has_native():
    _step = torch.ops.maskdm_fast.adamw_ema_.default

    @torch.library.register_fake("maskdm_fast::adamw_ema_")
    def _fake(
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
    ) -> None:
        return None


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
) -> None:
    grads = [grad.contiguous() for grad in grads]
    _step(
        params, grads, exp_avgs, exp_avg_sqs, emas, copies, grad_scale,
        lr, beta1, beta2, eps, weight_decay, step, ema_decay,
    )  # fmt: skip
