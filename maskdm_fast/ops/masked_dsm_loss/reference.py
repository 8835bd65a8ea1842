"""Ground truth of masked_dsm_loss in plain PyTorch."""

import torch
from torch import Tensor

from maskdm_fast.ops.checks import accumulate_dtype, check_segments, image_of_token


def forward(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    delta: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(pred.dtype)
    d = pred.to(dtype) - target.to(dtype)
    if kind == "mse":
        value, slope = d.square(), 2.0 * d
    elif kind == "l1":
        value, slope = d.abs(), d.sign()
    else:
        outside = d.abs() > delta
        value = torch.where(outside, delta * (d.abs() - 0.5 * delta), 0.5 * d.square())
        slope = torch.where(outside, delta * d.sign(), d)
    if cu_seqlens is None:
        count = torch.full((pred.shape[0],), pred.shape[1] * pred.shape[2], dtype=dtype, device=pred.device)
        total = value.flatten(1).sum(1)
    else:
        check_segments("masked_dsm_loss", cu_seqlens, pred.shape[0])
        count = cu_seqlens.diff().to(dtype) * pred.shape[1]
        image = image_of_token(cu_seqlens, pred.shape[0])
        total = torch.zeros_like(count).index_add(0, image, value.sum(1))
    count = count.clamp(min=1.0)
    factor = (1.0 if weight is None else weight) / count  # [B]
    factor = factor[:, None, None] if cu_seqlens is None else factor[image][:, None]
    return total / count, (factor * slope).to(pred.dtype) if with_grad else pred.new_empty(0)
