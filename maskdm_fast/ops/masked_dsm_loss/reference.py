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
    mean: bool,
) -> Tensor:
    d = _difference(pred, target)
    huber = torch.where(d.abs() > delta, delta * (d.abs() - 0.5 * delta), 0.5 * d.square())
    value = {"mse": d.square(), "l1": d.abs(), "huber": huber}[kind]
    if cu_seqlens is None:
        total = value.flatten(1).sum(1)
    else:
        check_segments("masked_dsm_loss", cu_seqlens, pred.shape[0])
        total = value.new_zeros(cu_seqlens.shape[0] - 1)
        total = total.index_add(0, image_of_token(cu_seqlens, pred.shape[0]), value.sum(1))
    loss = total / _count(pred, cu_seqlens) * (1.0 if weight is None else weight)
    return loss.mean() if mean else loss


def backward(
    grad_loss: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    delta: float,
    mean: bool,
) -> Tensor:
    d = _difference(pred, target)
    slope = {"mse": 2.0 * d, "l1": d.sign(), "huber": torch.where(d.abs() > delta, delta * d.sign(), d)}[kind]
    scale = grad_loss / _count(pred, cu_seqlens) * (1.0 if weight is None else weight)  # [B]
    scale = scale / scale.shape[0] if mean else scale
    scale = scale[:, None, None] if cu_seqlens is None else scale[image_of_token(cu_seqlens, pred.shape[0])][:, None]
    return (scale * slope).to(pred.dtype)


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    dtype = accumulate_dtype(pred.dtype)
    return pred.to(dtype) - target.to(dtype)


def _count(pred: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Values of each image, at least 1, in the accumulation dtype ``[B]``."""
    dtype = accumulate_dtype(pred.dtype)
    if cu_seqlens is None:
        return torch.full((pred.shape[0],), pred.shape[1] * pred.shape[2], dtype=dtype, device=pred.device)
    return (cu_seqlens.diff().to(dtype) * pred.shape[1]).clamp(min=1.0)
