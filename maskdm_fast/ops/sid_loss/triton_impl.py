"""sid_loss as Triton kernels; csrc/sid_loss computes the same.

    d = teacher - fake,  e = teacher - generated,  scale[b] = weight[b] w[b], or 0 where a sum is not finite
    loss[b] = scale[b] / M sum d (e - alpha d),    mean: 1/B sum_b loss[b]
    grads[b] = grad_loss scale[b] / M (p e + q d),    over B for the mean
    p, q = 0, -1 to generated; 1, 1 - 2 alpha to teacher; -1, 2 alpha to fake

An image is shared by a group of programs, one for about _VALUES values, each of which takes one stretch of it. The
first kernel writes two sums a program, in float64: of d (e - alpha d), and of the distances that w is 1 / mean of. The
second adds those of an image, writes its scale and its loss, and for the mean adds the images, in one program. Sums are
taken in an order that depends on the shapes only. The gradient kernel takes the same stretches and writes the
gradients that are wanted, rounded once.

Bytes, for values of s bytes: 3 s M forward (4 s M with xt) and 6 s M backward an image, and 32 a program. About 7 FLOPs
a value forward and 9 backward.

Must hold: all tensors are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.registration import opaque
from maskdm_fast.ops.sid_loss import fakes
from maskdm_fast.ops.triton_impl import stretch

_VALUES = 4096  # of an image that one program takes
_MAX_PROGRAMS = 256  # of one image
_BLOCK = 1024  # values at a time
_SUMS = 1024  # the second kernel adds at a time, at least one image's


@triton.jit
def _load(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sums_kernel(
    generated_ptr,
    teacher_ptr,
    fake_ptr,
    xt_ptr,  # None: the distances are to generated
    alpha_t_ptr,
    sums_ptr,  # [B, programs] float64, twice
    count: tl.int64,  # values of an image
    programs: tl.int32,  # of each image
    alpha,
    BLOCK: tl.constexpr,
):
    image, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    first, last = stretch(count, part, programs, BLOCK)
    inverse = 1.0
    if alpha_t_ptr is not None:
        inverse = 1.0 / tl.load(alpha_t_ptr + image)
    value, size = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask, offs = offs < last, image * count + offs
        teacher = _load(teacher_ptr, offs, mask)
        d, e = teacher - _load(fake_ptr, offs, mask), teacher - _load(generated_ptr, offs, mask)
        value += (d * (e - alpha * d)).to(tl.float64)
        if xt_ptr is not None:
            e = teacher - inverse * _load(xt_ptr, offs, mask)
        size += tl.abs(e).to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(value))
    tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(size))


@triton.jit
def _losses(
    sums_ptr, weight_ptr, scale_ptr, image, num_images, programs, count, NORMALISED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The losses of a block of images, 0 for those that do not exist, float64; their scales are stored."""
    mask_b = image < num_images
    image = tl.where(mask_b, image, 0)
    offs_p = tl.arange(0, BLOCK_P)
    mask = mask_b[:, None] & (offs_p < programs)[None, :]
    offs = (image * programs)[:, None] + offs_p[None, :]
    values = count.to(tl.float64)
    value = tl.sum(tl.load(sums_ptr + offs, mask=mask, other=0.0), axis=1) / values
    size = tl.full(value.shape, 1.0, tl.float64)
    if NORMALISED:
        sizes_ptr = sums_ptr + num_images.to(tl.int64) * programs
        size = tl.sum(tl.load(sizes_ptr + offs, mask=mask, other=0.0), axis=1) / values
        size = tl.where(size < 1e-5, 1e-5, size)  # NaN stays
    scale = 1.0 / size
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + image, mask=mask_b, other=0.0).to(tl.float64) / size
    kept = mask_b & (tl.abs(value) < float("inf")) & (size < float("inf"))
    scale = tl.where(kept, scale, 0.0)
    tl.store(scale_ptr + image, scale.to(tl.float32), mask=mask_b)
    return tl.where(kept, scale * value, 0.0)


@triton.jit
def _finish_kernel(
    sums_ptr,
    weight_ptr,
    scale_ptr,
    loss_ptr,
    num_images: tl.int32,
    programs: tl.int32,
    count: tl.int64,
    NORMALISED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_b = tl.arange(0, BLOCK_B).to(tl.int64)
    if MEAN:
        total = tl.zeros((BLOCK_B,), tl.float64)
        for first in range(0, num_images, BLOCK_B):
            total += _losses(
                sums_ptr, weight_ptr, scale_ptr, first + offs_b, num_images, programs, count, NORMALISED, BLOCK_P
            )
        tl.store(loss_ptr, (tl.sum(total) / num_images).to(tl.float32))
    else:
        image = tl.program_id(0) * BLOCK_B + offs_b
        loss = _losses(sums_ptr, weight_ptr, scale_ptr, image, num_images, programs, count, NORMALISED, BLOCK_P)
        tl.store(loss_ptr + image, loss.to(tl.float32), mask=image < num_images)


@triton.jit
def _store(grad_ptr, offs, grad, mask):
    if grad_ptr is not None:
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_kernel(
    grad_loss_ptr,
    scale_ptr,
    generated_ptr,
    teacher_ptr,
    fake_ptr,
    to_generated_ptr,  # None: not wanted
    to_teacher_ptr,
    to_fake_ptr,
    grad_loss_stride,  # 0 for the mean
    num_shares: tl.int32,  # images that share grad_loss: B for the mean, else 1
    count: tl.int64,
    programs: tl.int32,
    twice_alpha,
    BLOCK: tl.constexpr,
):
    image, part = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    first, last = stretch(count, part, programs, BLOCK)
    scale = tl.load(scale_ptr + image)
    end = tl.where(scale != 0.0, last, first)  # what is left out may hold anything, and is not read
    factor = tl.load(grad_loss_ptr + image * grad_loss_stride) * scale / count.to(tl.float32) / num_shares
    factor = tl.where(scale != 0.0, factor, 0.0)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask, kept, offs = offs < last, offs < end, image * count + offs
        teacher = _load(teacher_ptr, offs, kept)
        d, e = teacher - _load(fake_ptr, offs, kept), teacher - _load(generated_ptr, offs, kept)
        _store(to_generated_ptr, offs, factor * -d, mask)
        _store(to_teacher_ptr, offs, factor * (e + (1.0 - twice_alpha) * d), mask)
        _store(to_fake_ptr, offs, factor * (twice_alpha * d - e), mask)


def _programs(generated: Tensor) -> tuple[int, int, int]:
    """Images, values of each, and programs for each."""
    num_images = generated.shape[0]
    count = generated.shape[1:].numel()
    return num_images, count, min(triton.cdiv(count, _VALUES), _MAX_PROGRAMS)


@opaque(
    "sid_loss_fwd_triton(Tensor generated, Tensor teacher, Tensor fake, Tensor? weight, Tensor? xt, Tensor? alpha_t, "
    "float alpha, bool normalised, bool mean) -> (Tensor, Tensor)",
    fakes.sid_loss_fwd,
)
def forward(
    generated: Tensor,
    teacher: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    xt: Tensor | None,
    alpha_t: Tensor | None,
    alpha: float,
    normalised: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    num_images, count, programs = _programs(generated)
    scale = generated.new_empty(num_images, dtype=torch.float32)
    if num_images == 0:
        return scale.new_full(() if mean else (0,), float("nan")), scale
    loss = scale.new_empty(() if mean else (num_images,))
    sums = generated.new_empty(2 * num_images * programs, dtype=torch.float64)
    block_p = triton.next_power_of_2(programs)
    block_b = min(_SUMS // block_p, triton.next_power_of_2(num_images))
    with backend.current_device_of(generated):
        _sums_kernel[(num_images * programs,)](
            generated, teacher, fake, xt, alpha_t, sums, count, programs, alpha, BLOCK=_BLOCK
        )
        _finish_kernel[(1 if mean else triton.cdiv(num_images, block_b),)](
            sums, weight, scale, loss, num_images, programs, count,
            NORMALISED=normalised, MEAN=mean, BLOCK_B=block_b, BLOCK_P=block_p,
        )  # fmt: skip
    return loss, scale


@opaque(
    "sid_loss_bwd_triton(Tensor grad_loss, Tensor scale, Tensor generated, Tensor teacher, Tensor fake, float alpha, "
    "bool mean, bool to_generated, bool to_teacher, bool to_fake) -> (Tensor, Tensor, Tensor)",
    fakes.sid_loss_bwd,
)
def backward(
    grad_loss: Tensor,
    scale: Tensor,
    generated: Tensor,
    teacher: Tensor,
    fake: Tensor,
    alpha: float,
    mean: bool,
    to_generated: bool,
    to_teacher: bool,
    to_fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_images, count, programs = _programs(generated)
    wanted = (to_generated, to_teacher, to_fake)
    grads = tuple(torch.empty_like(generated) if want else generated.new_empty(0) for want in wanted)
    if num_images > 0:
        written = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        with backend.current_device_of(generated):
            _gradients_kernel[(num_images * programs,)](
                grad_loss, scale, generated, teacher, fake, *written, 0 if mean else grad_loss.stride(0),
                num_images if mean else 1, count, programs, 2.0 * alpha, BLOCK=_BLOCK,
            )  # fmt: skip
    return grads
