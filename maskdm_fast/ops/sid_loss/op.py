"""sid_loss: the generator's loss of score identity distillation."""

import math
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.autograd import once_differentiable
from maskdm_fast.ops.checks import FLOATING, accumulate_dtype, check_device, check_dtype, check_number, check_shape
from maskdm_fast.ops.sid_loss import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.sid_loss import triton_impl

    IMPL["triton"] = triton_impl

_OP = "sid_loss"
_WEIGHTINGS = ("l1", "l1_xt", "karras", "none")
_REDUCTIONS = ("mean", "none")


class _Loss(torch.autograd.Function):
    """The loss of every image, or in the mean; the normaliser counts as a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        generated: Tensor,
        teacher: Tensor,
        fake: Tensor,
        weight: Tensor | None,
        xt: Tensor | None,
        alpha_t: Tensor | None,
        alpha: float,
        normalised: bool,
        mean: bool,
        backend: str,
    ) -> Tensor:
        loss, scale = IMPL[backend].forward(generated, teacher, fake, weight, xt, alpha_t, alpha, normalised, mean)
        ctx.save_for_backward(generated, teacher, fake, weight, xt, alpha_t, scale)
        ctx.options = alpha, normalised, mean, backend
        return loss

    @staticmethod
    @once_differentiable(_OP)
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        generated, teacher, fake, weight, xt, alpha_t, scale = ctx.saved_tensors
        alpha, normalised, mean, backend = ctx.options
        wanted, to_weight = ctx.needs_input_grad[:3], ctx.needs_input_grad[3]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        grad_weight = None
        if any(wanted):
            found = IMPL[backend].backward(grad_loss, scale, generated, teacher, fake, alpha, mean, *wanted)
            grads = tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))
        if to_weight:
            # Weights are seldom learned, so the losses of the images are computed again rather than kept.
            raw, _ = IMPL[backend].forward(generated, teacher, fake, None, xt, alpha_t, alpha, normalised, False)
            grad_weight = grad_loss * raw
            grad_weight = grad_weight / weight.shape[0] if mean else grad_weight
        return *grads, grad_weight, None, None, None, None, None, None


def sid_loss(
    generated: Tensor,
    teacher: Tensor,
    fake: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 1.0,
    weighting: str = "l1",
    xt: Tensor | None = None,
    alpha_t: Tensor | None = None,
    sigma_t: Tensor | None = None,
    sigma_data: float = 0.5,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """What score identity distillation (SiD) minimises over the generator, per image and in the mean over images.

        d = teacher - fake,    e = teacher - generated,    M values an image
        loss[b] = weight[b] w[b] / M sum d (e - alpha d),    mean: 1/B sum_b loss[b]
        w[b] = 1 / max(1e-5, mean |e|)                        l1, the official one
               1 / max(1e-5, mean |teacher - xt / alpha_t|)   l1_xt
               1 / s^2 + 1 / sigma_data^2, s = sigma_t / alpha_t   karras
               1                                              none

    Gradients go to `generated`, `teacher` and `fake`, and none through w: with c = weight w / M they are ``-c d``,
    ``c (e + (1 - 2 alpha) d)`` and ``c (2 alpha d - e)``, which sum to 0. The two networks get theirs because they were
    given ``xt = alpha_t generated + sigma_t eps``; their parameters should not require any. Where `teacher` and `fake`
    are detached, what `generated` gets is the gradient of distribution matching (DMD2), and the other two gradients are
    not computed.

    An image with a value that is not finite in one of the three, or with sums that are not, has loss 0 and gradients
    0. It still counts in B.

    The value is no sign of convergence: with a trained `fake` its mean is (1 - alpha) times the Fisher divergence, so
    about 0 for alpha 1 and negative above. The official code's scalar is 100 M times the mean.

    Forward and backward are one pass each; one number an image is kept in between. d is a small difference of large
    numbers, so float32 inputs are advised. Sums are in float64 or better.

    Args:
        generated: the generator's images, ``[B, ...]``; float32, float16, bfloat16 or float64.
        teacher: the teacher's estimate of x0 at `xt`, of the same shape and dtype.
        fake: the fake score network's, likewise.
        weight: per-image weight ``[B]``, floating point; None: 1.
        alpha: share of ``|d|^2`` taken off, finite; 0.5 follows the Fisher divergence, 1.2 and 1.0 are the
            published ones.
        weighting: ``"l1"``, ``"l1_xt"``, ``"karras"`` or ``"none"``. The first is off by O(1/M): not for a few values
            an image.
        xt: what both networks were given, like `generated`; for ``"l1_xt"``, which alone reads it. A constant.
        alpha_t: its noise level ``[B]``, > 0; for ``"l1_xt"`` and ``"karras"``; None: 1. A constant.
        sigma_t: its noise level ``[B]``, > 0; for ``"karras"``. A constant.
        sigma_data: standard deviation of the data, > 0; for ``"karras"``.
        reduction: ``"mean"`` for a scalar, ``"none"`` for ``[B]``.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or ``[B]``. The mean over zero images is NaN, as torch.mean's.

    Raises:
        ValueError, TypeError: wrong shape, value or device, no values in an image, what the weighting needs is missing;
            wrong type or dtype.
        RuntimeError: the named backend cannot run.

    Source: SiD (arXiv 2404.04057) and its official code, https://github.com/mingyuanzhou/SiD; ``"karras"`` is the
    weighting of EDM (arXiv 2206.00364), table 1.
    """
    check_dtype(_OP, "generated", generated, FLOATING)
    if generated.dim() == 0 or generated.shape[1:].numel() == 0:
        raise ValueError(f"{_OP}: generated has shape {list(generated.shape)}, want [B, ...] with values")
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"{_OP}: weighting is {weighting!r}, want one of {', '.join(_WEIGHTINGS)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{_OP}: reduction is {reduction!r}, want one of {', '.join(_REDUCTIONS)}")
    if weighting == "l1_xt" and xt is None:
        raise ValueError(f"{_OP}: weighting 'l1_xt' needs xt")
    if weighting == "karras" and sigma_t is None:
        raise ValueError(f"{_OP}: weighting 'karras' needs sigma_t")
    alpha, sigma_data = check_number(_OP, "alpha", alpha), check_number(_OP, "sigma_data", sigma_data)
    if not -math.inf < alpha < math.inf:  # every image would be one that is not finite, and the loss 0
        raise ValueError(f"{_OP}: alpha is {alpha}, want a finite number")
    if not sigma_data > 0:
        raise ValueError(f"{_OP}: sigma_data is {sigma_data}, want a positive number")
    for name, tensor in (("teacher", teacher), ("fake", fake), ("xt", xt)):
        if tensor is not None:
            check_dtype(_OP, name, tensor, (generated.dtype,))
            check_device(_OP, name, tensor, generated.device)
            check_shape(_OP, name, tensor, *generated.shape)
    weight, alpha_t, sigma_t = (
        None if tensor is None else _per_image(name, tensor, generated)
        for name, tensor in (("weight", weight), ("alpha_t", alpha_t), ("sigma_t", sigma_t))
    )
    if weighting == "karras":
        inverse = (1.0 if alpha_t is None else alpha_t.detach()) / sigma_t.detach()
        karras = inverse.square() + sigma_data**-2
        weight = karras if weight is None else weight * karras
    of_xt = weighting == "l1_xt"
    chosen = backends.choose(_OP, IMPL, generated, backend)
    return _Loss.apply(
        generated.contiguous(),
        teacher.contiguous(),
        fake.contiguous(),
        weight,
        xt.detach().contiguous() if of_xt else None,
        alpha_t.detach() if of_xt and alpha_t is not None else None,
        alpha,
        weighting.startswith("l1"),
        reduction == "mean",
        chosen,
    )


def _per_image(name: str, tensor: Tensor, generated: Tensor) -> Tensor:
    """One number an image, checked, in the accumulation dtype."""
    check_dtype(_OP, name, tensor, FLOATING)
    check_device(_OP, name, tensor, generated.device)
    check_shape(_OP, name, tensor, generated.shape[0])
    return tensor.to(accumulate_dtype(generated.dtype)).contiguous()
