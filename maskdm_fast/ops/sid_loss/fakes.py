"""Shapes and dtypes of what the operators of sid_loss return, for torch.compile; on every backend."""

import torch
from torch import Tensor

from maskdm_fast.ops.checks import accumulate_dtype


def sid_loss_fwd(
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
    """The loss, a scalar with `mean`, else ``[B]``; and weight times w of every image, 0 where it is left out."""
    scale = generated.new_empty(generated.shape[0], dtype=accumulate_dtype(generated.dtype))
    return torch.empty_like(scale) if not mean else scale.new_empty(()), scale


def sid_loss_bwd(
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
    """The gradients to generated, teacher and fake, like them; ``[0]`` where not asked for."""
    wanted = (to_generated, to_teacher, to_fake)
    return tuple(torch.empty_like(generated) if want else generated.new_empty(0) for want in wanted)
