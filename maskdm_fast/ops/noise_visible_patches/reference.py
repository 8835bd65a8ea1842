"""Ground truth of noise_visible_patches in plain PyTorch: noises every patch, then keeps the visible ones."""

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.ops.checks import accumulate_dtype, check_ids


def forward(
    images: Tensor,
    ids_keep: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    slots: Tensor,
    step: Tensor,
    flip: Tensor | None,
    patch_size: int,
    channels_last: bool,
    prediction: str,
    seed: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(out_dtype)
    pixels = images if channels_last else images.movedim(1, -1)  # [B, height, width, C]
    x0 = pixels.to(dtype) / 127.5 - 1.0 if images.dtype == torch.uint8 else pixels.to(dtype)
    if flip is not None:
        x0 = torch.where(flip[:, None, None, None], x0.flip(2), x0)
    num_images, height, width, channels = x0.shape
    grid = (num_images, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    x0 = x0.reshape(grid).transpose(2, 3).flatten(3).flatten(1, 2)  # [B, N, P P C]
    eps = random.normal(
        x0.shape[1] * x0.shape[2], seed=seed, stream=random.Stream.NOISE, step=step, slots=slots, dtype=dtype
    )
    eps = eps.view_as(x0)
    if ids_keep is not None:
        check_ids("noise_visible_patches", ids_keep, x0.shape[1], None, distinct=False)
        index = ids_keep[:, :, None].expand(-1, -1, x0.shape[2])
        x0, eps = x0.gather(1, index), eps.gather(1, index)
    alpha, sigma = alpha[:, None, None], sigma[:, None, None]
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]
    return (alpha * x0 + sigma * eps).to(out_dtype), target.to(out_dtype)
