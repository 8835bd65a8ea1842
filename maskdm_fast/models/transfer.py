"""Weights of one image or patch size, made to fit another.

A network that saw 64 px images goes on at 128 px in one of two ways. With the patch size kept there are four times as
many patches, and only the position table has to change. With the patch size doubled the number of patches stays, and
the two layers that touch pixels change:

    positions  rows of the patches interpolated over their grid (bicubic), rows of the extras kept
    embedding  W' = W pinv(R)     the embedding of an enlarged image is that of the original
    head       W' = R W, b' = R b what is predicted is the enlarged prediction

R resizes one patch by areas: enlarging by a whole factor repeats each pixel, shrinking averages, so pinv(R) averages
where R repeats. Patches do not overlap, so resizing them one by one is resizing the image, and the whole network maps a
repeated image to its repeated prediction, exactly; but not one with a final convolution, which reads neighbouring
pixels, whatever their size. Averaging also lowers the noise that the network sees: at twice the side it sees four times
the signal-to-noise ratio of the images it is given. For weights trained with the cosine schedule the shifted one makes
up for that.

Source: the pseudo-inverse is that of Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023, section 3.4
(there with bilinear R); the head's counterpart and the choice of areas are ours.
"""

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast.models.uvit import UViTConfig

TRANSFERABLE = frozenset({"image_size", "patch_size", "final_conv"})
"""Fields of `UViTConfig` in which the two configurations of a `transfer` may differ."""


def changed_fields(old: UViTConfig, new: UViTConfig) -> dict[str, tuple[Any, Any]]:
    """``{field: (old, new)}`` where two networks differ; depths that build equal networks are equal."""
    pairs = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(UViTConfig)}
    pairs["depth"] = (old.num_blocks, new.num_blocks)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def transfer(tensors: dict[str, Tensor], old: UViTConfig, new: UViTConfig) -> dict[str, Tensor]:
    """Make trained weights fit another image size, patch size, or both; and add a final convolution, as the identity.

    Args:
        tensors: state dict of a `UViT` of `old`; left as it is.
        old: what it was trained as.
        new: what it shall become.

    Returns:
        A state dict for a `UViT` of `new`, in the same dtypes. What needs no change is the same tensor, not a copy.

    Warns:
        RuntimeWarning: the patch size changes and there is a final convolution, which no weights of its size fit to
            other pixels.

    Raises:
        ValueError: the networks differ in more than `TRANSFERABLE`, or `new` lacks the final convolution of `old`.
    """
    changed = changed_fields(old, new)
    others = [f"{name} {pair[0]} -> {pair[1]}" for name, pair in changed.items() if name not in TRANSFERABLE]
    if others:
        raise ValueError(
            f"transfer: the networks differ in {', '.join(others)}; only {', '.join(sorted(TRANSFERABLE))} may change"
        )
    if old.final_conv and not new.final_conv:
        raise ValueError(
            "transfer: the weights have a final convolution and the new network has none; set final_conv=True, since "
            "the trained head counts on it"
        )
    if old.final_conv and old.patch_size != new.patch_size:
        warnings.warn(
            f"transfer: the patch size goes from {old.patch_size} to {new.patch_size}, but the final convolution still "
            "reads 3x3 pixels, which are of another size: the network does not begin at what it had learnt to predict",
            RuntimeWarning,
            stacklevel=2,
        )
    out = dict(tensors)
    sides = [config.image_size // config.patch_size for config in (old, new)]
    if sides[0] != sides[1]:
        out["positions"] = _resize_positions(tensors["positions"], old.num_extras, *sides)
    if old.patch_size != new.patch_size:
        resize = _area_matrix(old.patch_size, new.patch_size)  # [p', p]
        out["patch_embed.weight"] = _resize_columns(tensors["patch_embed.weight"], torch.linalg.pinv(resize).t(), old)
        out["head.weight"] = _resize_columns(tensors["head.weight"].t(), resize, old).t().contiguous()
        out["head.bias"] = _resize_columns(tensors["head.bias"][None], resize, old)[0]
    if new.final_conv and not old.final_conv:
        like = tensors["head.bias"]
        kernel = torch.zeros(new.channels, new.channels, 3, 3, dtype=like.dtype, device=like.device)
        kernel[:, :, 1, 1].fill_diagonal_(1.0)
        out |= {"final_conv.weight": kernel, "final_conv.bias": kernel.new_zeros(new.channels)}
    return out


def _resize_positions(table: Tensor, num_extras: int, side: int, new_side: int) -> Tensor:
    """Interpolate the patch rows of ``[extras + side**2, D]``; the extras have no place on the grid and stay."""
    grid = table[num_extras:].t().unflatten(1, (side, side))[None].to(torch.float64)  # [1, D, side, side]
    # Without antialiasing, shrinking by more than 2 would pass over rows.
    size = (new_side, new_side)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=new_side < side)
    return torch.cat((table[:num_extras], grid[0].flatten(1).t().to(table.dtype)))


def _resize_columns(weight: Tensor, matrix: Tensor, old: UViTConfig) -> Tensor:
    """Apply ``matrix [p', p]`` to both axes of the pixels in the last axis of ``[D, p*p*C]``, ordered (py, px, c)."""
    pixels = weight.unflatten(1, (old.patch_size, old.patch_size, old.channels)).to(torch.float64)
    matrix = matrix.to(weight.device)
    return torch.einsum("dyxc,iy,jx->dijc", pixels, matrix, matrix).flatten(1).to(weight.dtype)


def _area_matrix(old: int, new: int) -> Tensor:
    """float64 ``[new, old]``: new pixel i is the mean of the old ones under it, weighted by their overlap."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    left, right = edges[:-1, None], edges[1:, None]
    start = torch.arange(old, dtype=torch.float64)
    overlap = (torch.minimum(right, start + 1) - torch.maximum(left, start)).clamp(min=0.0)
    return overlap / overlap.sum(1, keepdim=True)
