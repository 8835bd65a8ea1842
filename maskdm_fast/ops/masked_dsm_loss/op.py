"""masked_dsm_loss: the denoising score-matching loss over visible tokens, with its gradient from the same pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.checks import (
    FLOATING,
    accumulate_dtype,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_shape,
    image_of_token,
)
from maskdm_fast.ops.masked_dsm_loss import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl}

_OP = "masked_dsm_loss"
_KINDS = ("mse", "l1", "huber")
_REDUCTIONS = ("mean", "none")


class _Loss(torch.autograd.Function):
    """weight[b] times the mean loss of image b, for every image or in the mean.

    The mean is taken in here, so that the backward pass multiplies by one number instead of one per image.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        cu_seqlens: Tensor | None,
        kind: str,
        delta: float,
        reduction: str,
        backend: str,
    ) -> Tensor:
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        raw, grad = IMPL[backend].forward(pred, target, weight, cu_seqlens, kind, delta, with_grad)
        ctx.save_for_backward(grad, raw, cu_seqlens)
        ctx.reduction = reduction
        if reduction == "mean":
            return raw.mean() if weight is None else (weight * raw).mean()
        return raw.clone() if weight is None else weight * raw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, raw, cu_seqlens = ctx.saved_tensors
        grad_pred = grad_target = grad_weight = None
        factor = grad_loss / raw.shape[0] if ctx.reduction == "mean" else grad_loss
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            if ctx.reduction == "mean":
                per_token = factor
            elif cu_seqlens is None:
                per_token = factor[:, None, None]
            else:
                per_token = factor[image_of_token(cu_seqlens, grad.shape[0])][:, None]
            grad_pred = (grad * per_token).to(grad.dtype)
            grad_target = -grad_pred if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[2]:
            grad_weight = factor * raw
        return grad_pred if ctx.needs_input_grad[0] else None, grad_target, grad_weight, None, None, None, None, None


def masked_dsm_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    kind: str = "mse",
    delta: float = 1.0,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Mean loss over the visible tokens and values of each image, times its weight; then the mean over images.

        loss[b] = weight[b] / (K D) sum_kd f(pred - target),    mean: 1/B sum_b loss[b]
        f(d) = d^2 (mse), |d| (l1), d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2) (huber)

    The forward pass writes the gradient to `pred`; the backward pass scales it. Sums are in float32 or better. In the
    packed form an image without tokens has loss 0.

    Args:
        pred: ``[B, K, D]``, or packed ``[T, D]``; float32, float16, bfloat16 or float64.
        target: same shape and dtype as `pred`.
        weight: per-image weight ``[B]``, floating point, e.g. min-SNR; None: 1.
        kind: ``"mse"``, ``"l1"`` or ``"huber"``.
        delta: where huber turns from quadratic to linear, > 0.
        cu_seqlens: int32 ``[B + 1]``, cumulative token counts of the packed form.
        reduction: ``"mean"`` for a scalar, ``"none"`` for ``[B]``.
        backend: ``"reference"`` or ``"cpu"``; None chooses.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or ``[B]``. The mean over zero images is NaN, as torch.mean's.

    Raises:
        ValueError, TypeError: wrong shape, value or device, no tokens at all in the equal-length form; wrong dtype.
        RuntimeError: cu_seqlens does not rise from 0 to T (checked on CPU); the named backend cannot run.

    Source: MaskDM (arXiv 2306.11363), eq. 2.
    """
    check_dtype(_OP, "pred", pred, FLOATING)
    check_dtype(_OP, "target", target, (pred.dtype,))
    check_device(_OP, "target", target, pred.device)
    if cu_seqlens is None:
        check_shape(_OP, "pred", pred, "B", "K", "D")
        num_images = pred.shape[0]
        if pred.shape[1] * pred.shape[2] == 0:
            raise ValueError(f"{_OP}: pred has shape {list(pred.shape)}, want at least one token and one value")
    else:
        check_shape(_OP, "pred", pred, "T", "D")
        check_cu_seqlens(_OP, cu_seqlens, pred.device)
        cu_seqlens = cu_seqlens.contiguous()
        num_images = cu_seqlens.shape[0] - 1
    check_shape(_OP, "target", target, *pred.shape)
    if weight is not None:
        check_dtype(_OP, "weight", weight, FLOATING)
        check_device(_OP, "weight", weight, pred.device)
        check_shape(_OP, "weight", weight, num_images)
        weight = weight.to(accumulate_dtype(pred.dtype))
    if kind not in _KINDS:
        raise ValueError(f"{_OP}: kind is {kind!r}, want one of {', '.join(_KINDS)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{_OP}: reduction is {reduction!r}, want one of {', '.join(_REDUCTIONS)}")
    if not delta > 0:
        raise ValueError(f"{_OP}: delta is {delta}, want a positive number")
    chosen = backends.choose(_OP, pred.device, backend)
    return _Loss.apply(pred, target, weight, cu_seqlens, kind, float(delta), reduction, chosen)
