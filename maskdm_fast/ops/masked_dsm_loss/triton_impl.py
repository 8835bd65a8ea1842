"""masked_dsm_loss as Triton kernels; csrc/masked_dsm_loss computes the same.

    loss[b] = weight[b] / (K D) sum f(pred - target),    mean: 1/B sum_b loss[b]
    grad[b] = grad_loss weight[b] / (K D) f'(pred - target),    over B for the mean

An image is shared by a group of programs, one for about _VALUES values, each of which takes one stretch of it. The
first kernel writes one sum a program, in float64; the second adds those of an image, weights them, and for the mean
adds the images, in one program. Sums are taken in an order that depends on the shapes only. The backward kernel takes
the same stretches and writes the gradient, rounded once.

Bytes, for values of s bytes: 2 s K D forward and 3 s K D backward an image, and 16 a program. 4 FLOPs a value (mse).

Must hold: cu_seqlens rises from 0 to T (whatever it holds, nothing outside the tensors is touched). An image without
tokens has loss 0; NaN goes through.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.masked_dsm_loss import fakes
from maskdm_fast.ops.registration import opaque
from maskdm_fast.ops.triton_impl import stretch

_VALUES = 4096  # of the average image that one program takes
_MAX_PROGRAMS = 256  # of one image
_BLOCK = 1024  # values at a time
_SUMS = 2048  # the second kernel adds at a time, at least one image's


@triton.jit
def _image_values(cu_seqlens_ptr, image, tokens_per_image, all_tokens, width):
    """Where the values of an image begin and how many they are, int64."""
    if cu_seqlens_ptr is None:
        begin = image * tokens_per_image
        end = begin + tokens_per_image
    else:
        begin = tl.maximum(tl.load(cu_seqlens_ptr + image), 0).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + image + 1), all_tokens).to(tl.int64)
    return begin * width, tl.maximum(end - begin, 0) * width


@triton.jit
def _sum_kernel(
    pred_ptr,
    target_ptr,
    cu_seqlens_ptr,
    sums_ptr,  # [B, programs] float64
    tokens_per_image: tl.int64,  # where it is not packed
    all_tokens: tl.int32,  # where it is
    width,
    programs: tl.int32,  # of each image
    delta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    begin, count = _image_values(cu_seqlens_ptr, image, tokens_per_image, all_tokens, width)
    first, last = stretch(count, part, programs, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        pred = tl.load(pred_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
        d = pred - tl.load(target_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
        if KIND == "mse":
            value = d * d
        elif KIND == "l1":
            value = tl.abs(d)
        else:
            value = tl.where(tl.abs(d) > delta, delta * (tl.abs(d) - 0.5 * delta), 0.5 * d * d)
        total += value.to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _losses(
    sums_ptr, weight_ptr, cu_seqlens_ptr, image, num_images, programs, tokens_per_image, all_tokens, width,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The losses of a block of images, 0 for those that do not exist, float64."""
    mask_b = image < num_images
    image = tl.where(mask_b, image, 0)
    offs_p = tl.arange(0, BLOCK_P)
    mask = mask_b[:, None] & (offs_p < programs)[None, :]
    sums = tl.load(sums_ptr + (image * programs)[:, None] + offs_p[None, :], mask=mask, other=0.0)
    _, count = _image_values(cu_seqlens_ptr, image, tokens_per_image, all_tokens, width)
    loss = tl.sum(sums, axis=1) / tl.maximum(count, 1).to(tl.float64)
    if weight_ptr is not None:
        loss *= tl.load(weight_ptr + image, mask=mask_b, other=0.0).to(tl.float64)
    return loss


@triton.jit
def _finish_kernel(
    sums_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    loss_ptr,
    num_images: tl.int32,
    programs: tl.int32,
    tokens_per_image: tl.int64,
    all_tokens: tl.int32,
    width,
    MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_b = tl.arange(0, BLOCK_B).to(tl.int64)
    if MEAN:
        total = tl.zeros((BLOCK_B,), tl.float64)
        for first in range(0, num_images, BLOCK_B):
            total += _losses(
                sums_ptr, weight_ptr, cu_seqlens_ptr, first + offs_b, num_images, programs, tokens_per_image,
                all_tokens, width, BLOCK_P,
            )  # fmt: skip
        tl.store(loss_ptr, (tl.sum(total) / num_images).to(loss_ptr.dtype.element_ty))
    else:
        image = tl.program_id(0) * BLOCK_B + offs_b
        loss = _losses(
            sums_ptr, weight_ptr, cu_seqlens_ptr, image, num_images, programs, tokens_per_image, all_tokens, width,
            BLOCK_P,
        )  # fmt: skip
        tl.store(loss_ptr + image, loss.to(loss_ptr.dtype.element_ty), mask=image < num_images)


@triton.jit
def _gradient_kernel(
    grad_loss_ptr,
    pred_ptr,
    target_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    grad_ptr,
    grad_loss_stride,  # 0 for the mean
    num_shares: tl.int32,  # images that share grad_loss: B for the mean, else 1
    tokens_per_image: tl.int64,
    all_tokens: tl.int32,
    width,
    programs: tl.int32,
    delta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    begin, count = _image_values(cu_seqlens_ptr, image, tokens_per_image, all_tokens, width)
    first, last = stretch(count, part, programs, BLOCK)
    scale = tl.load(grad_loss_ptr + image * grad_loss_stride).to(tl.float32)
    scale = scale / tl.maximum(count, 1).to(tl.float32) / num_shares
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + image)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        pred = tl.load(pred_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
        d = pred - tl.load(target_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        if KIND == "mse":
            slope = 2.0 * d
        elif KIND == "l1":
            slope = sign
        else:
            slope = tl.where(tl.abs(d) > delta, delta * sign, d)
        tl.store(grad_ptr + begin + offs, (scale * slope).to(grad_ptr.dtype.element_ty), mask=mask)


def _sizes(pred: Tensor, cu_seqlens: Tensor | None) -> tuple[int, tuple[int, int, int, int]]:
    """The number of images, and tokens_per_image, all_tokens, width and programs."""
    num_images = pred.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    average = triton.cdiv(pred.numel(), max(1, num_images))
    programs = min(max(1, triton.cdiv(average, _VALUES)), _MAX_PROGRAMS)
    return num_images, (pred.shape[-2], pred.shape[0], pred.shape[-1], programs)


@opaque(
    "masked_dsm_loss_fwd_triton(Tensor pred, Tensor target, Tensor? weight, Tensor? cu_seqlens, str kind, float delta, "
    "bool mean) -> Tensor",
    fakes.masked_dsm_loss_fwd,
)
def forward(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    delta: float,
    mean: bool,
) -> Tensor:
    num_images, sizes = _sizes(pred, cu_seqlens)
    tokens_per_image, all_tokens, width, programs = sizes
    if num_images == 0:
        return pred.new_full(() if mean else (0,), float("nan"), dtype=torch.float32)
    loss = pred.new_empty(() if mean else (num_images,), dtype=torch.float32)
    sums = pred.new_empty(num_images * programs, dtype=torch.float64)
    block_p = triton.next_power_of_2(programs)
    block_b = min(_SUMS // block_p, triton.next_power_of_2(num_images))
    with backend.current_device_of(pred):
        _sum_kernel[(num_images * programs,)](pred, target, cu_seqlens, sums, *sizes, delta, KIND=kind, BLOCK=_BLOCK)
        _finish_kernel[(1 if mean else triton.cdiv(num_images, block_b),)](
            sums, weight, cu_seqlens, loss, num_images, programs, tokens_per_image, all_tokens, width,
            MEAN=mean, BLOCK_B=block_b, BLOCK_P=block_p,
        )  # fmt: skip
    return loss


@opaque(
    "masked_dsm_loss_bwd_triton(Tensor grad_loss, Tensor pred, Tensor target, Tensor? weight, Tensor? cu_seqlens, "
    "str kind, float delta, bool mean) -> Tensor",
    fakes.masked_dsm_loss_bwd,
)
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
    num_images, sizes = _sizes(pred, cu_seqlens)
    grad = torch.empty_like(pred)
    if grad.numel() > 0:
        with backend.current_device_of(pred):
            _gradient_kernel[(num_images * sizes[-1],)](
                grad_loss, pred, target, weight, cu_seqlens, grad, 0 if mean else grad_loss.stride(0),
                num_images if mean else 1, *sizes, delta, KIND=kind, BLOCK=_BLOCK,
            )  # fmt: skip
    return grad
