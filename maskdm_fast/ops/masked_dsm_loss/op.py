"""masked_dsm_loss: the denoising score-matching loss over visible tokens."""

from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.autograd import once_differentiable
from maskdm_fast.ops.checks import (
    FLOATING,
    accumulate_dtype,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_number,
    check_shape,
)
from maskdm_fast.ops.masked_dsm_loss import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.masked_dsm_loss import triton_impl

    IMPL["triton"] = triton_impl

_OP = "masked_dsm_loss"
_KINDS = ("mse", "l1", "huber")
_REDUCTIONS = ("mean", "none")


class _Loss(torch.autograd.Function):
    """weight[b] times the mean loss of image b, for every image or in the mean."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        cu_seqlens: Tensor | None,
        kind: str,
        delta: float,
        mean: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(pred, target, weight, cu_seqlens)
        ctx.options = kind, delta, mean, backend
        return IMPL[backend].forward(pred, target, weight, cu_seqlens, kind, delta, mean)

    @staticmethod
    @once_differentiable(_OP)
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, weight, cu_seqlens = ctx.saved_tensors
        kind, delta, mean, backend = ctx.options
        to_pred, to_target, to_weight = ctx.needs_input_grad[:3]
        grad_pred = grad_target = grad_weight = None
        if to_pred or to_target:
            grad_pred = IMPL[backend].backward(grad_loss, pred, target, weight, cu_seqlens, kind, delta, mean)
        if to_target:
            grad_target = -grad_pred
        if to_weight:
            # Weights are seldom learned, so the losses of the images are computed again rather than kept.
            grad_weight = grad_loss * IMPL[backend].forward(pred, target, None, cu_seqlens, kind, delta, False)
            grad_weight = grad_weight / weight.shape[0] if mean else grad_weight
        return grad_pred if to_pred else None, grad_target, grad_weight, None, None, None, None, None


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

    Forward and backward are one pass each over `pred` and `target`; nothing as large as them is kept in between. Sums
    are in float64 or better. In the packed form an image without tokens has loss 0.

    Args:
        pred: ``[B, K, D]``, or packed ``[T, D]``; float32, float16, bfloat16 or float64.
        target: same shape and dtype as `pred`.
        weight: per-image weight ``[B]``, floating point, e.g. min-SNR; None: 1.
        kind: ``"mse"``, ``"l1"`` or ``"huber"``.
        delta: where huber turns from quadratic to linear, > 0.
        cu_seqlens: int32 ``[B + 1]``, cumulative token counts of the packed form.
        reduction: ``"mean"`` for a scalar, ``"none"`` for ``[B]``.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or ``[B]``. The mean over zero images is NaN, as torch.mean's.

    Raises:
        ValueError, TypeError: wrong shape, value or device, no tokens at all in the equal-length form; wrong type
            or dtype.
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
        weight = weight.to(accumulate_dtype(pred.dtype)).contiguous()
    if kind not in _KINDS:
        raise ValueError(f"{_OP}: kind is {kind!r}, want one of {', '.join(_KINDS)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{_OP}: reduction is {reduction!r}, want one of {', '.join(_REDUCTIONS)}")
    delta = check_number(_OP, "delta", delta)
    if not delta > 0:
        raise ValueError(f"{_OP}: delta is {delta}, want a positive number")
    chosen = backends.choose(_OP, IMPL, pred, backend)
    return _Loss.apply(
        pred.contiguous(), target.contiguous(), weight, cu_seqlens, kind, delta, reduction == "mean", chosen
    )
