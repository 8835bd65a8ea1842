"""Ground truth of noise_visible_patches in plain PyTorch: noises every patch, then keeps the visible ones."""

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.ops.checks import accumulate_dtype, check_ids, image_of_token


def forward(
    images: Tensor,
    ids_keep: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    eps_scale: Tensor,
    x0_scale: Tensor,
    slots: Tensor,
    step: Tensor,
    flip: Tensor | None,
    patch_size: int,
    channels_last: bool,
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
        check_ids("noise_visible_patches", ids_keep, x0.shape[1], cu_seqlens, distinct=False)
    coefficients = torch.stack([alpha, sigma, eps_scale, x0_scale])  # [4, B]
    if ids_keep is not None and cu_seqlens is not None:
        image = image_of_token(cu_seqlens, ids_keep.shape[0])
        x0, eps, coefficients = x0[image, ids_keep], eps[image, ids_keep], coefficients[:, image, None]
    else:
        coefficients = coefficients[:, :, None, None]
        if ids_keep is not None:
            index = ids_keep[:, :, None].expand(-1, -1, x0.shape[2])
            x0, eps = x0.gather(1, index), eps.gather(1, index)
    alpha, sigma, eps_scale, x0_scale = coefficients.unbind()
    return (alpha * x0 + sigma * eps).to(out_dtype), (eps_scale * eps + x0_scale * x0).to(out_dtype)
