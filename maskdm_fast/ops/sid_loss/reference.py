"""Ground truth of sid_loss in plain PyTorch."""

import torch
from torch import Tensor

from maskdm_fast.ops.checks import accumulate_dtype


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
    d, e = _differences(generated, teacher, fake)
    value = (d * (e - alpha * d)).mean(1)
    scale = torch.ones_like(value) if weight is None else weight
    size = torch.ones_like(value)
    if normalised:
        anchor = None if xt is None else xt.flatten(1).to(e.dtype) / (1.0 if alpha_t is None else alpha_t[:, None])
        size = (e if anchor is None else teacher.flatten(1).to(e.dtype) - anchor).abs().mean(1).clamp(min=1e-5)
    kept = value.isfinite() & size.isfinite()
    scale = torch.where(kept, scale / size, 0.0)
    loss = torch.where(kept, scale * value, 0.0)
    return loss.mean() if mean else loss, scale


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
    d, e = _differences(generated, teacher, fake)
    factor = (grad_loss * scale / (d.shape[1] * (d.shape[0] if mean else 1)))[:, None]
    slopes = (-d, e + (1.0 - 2.0 * alpha) * d, 2.0 * alpha * d - e)
    grads = (torch.where(scale[:, None] == 0, 0.0, factor * slope).view_as(fake).to(fake.dtype) for slope in slopes)
    wanted = (to_generated, to_teacher, to_fake)
    return tuple(grad if want else fake.new_empty(0) for grad, want in zip(grads, wanted, strict=True))


def _differences(generated: Tensor, teacher: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """d and e of all images, ``[B, M]``, in the accumulation dtype."""
    wide = [tensor.flatten(1).to(accumulate_dtype(tensor.dtype)) for tensor in (generated, teacher, fake)]
    return wide[1] - wide[2], wide[1] - wide[0]
