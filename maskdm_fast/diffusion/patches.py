"""Images to patch vectors and back. Vectors are ordered (py, px, c) as `ops.noise_visible_patches` writes them."""

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut ``[B, C, height, width]`` into patch vectors ``[B, N, P*P*C]``, patches row by row.

    Raises:
        ValueError: if `images` is not 4-D or `patch_size` does not divide both sides, or is no size.
    """
    _check_patch_size("patchify", patch_size)
    if images.ndim != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"patchify: images has shape {list(images.shape)}, want [B, C, height, width] "
            f"with both sides multiples of {patch_size}"
        )
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int, channels: int) -> Tensor:
    """Put patch vectors ``[B, N, P*P*C]`` together to ``[B, C, height, width]``: the inverse of `patchify`.

    Raises:
        ValueError: if `tokens` does not have the shape that the other arguments imply, or `patch_size` is no size.
    """
    _check_patch_size("unpatchify", patch_size)
    rows, columns = height // patch_size, width // patch_size
    want = [rows * columns, patch_size**2 * channels]
    if height % patch_size or width % patch_size or tokens.ndim != 3 or list(tokens.shape[1:]) != want:
        raise ValueError(
            f"unpatchify: tokens has shape {list(tokens.shape)}, want [B, {want[0]}, {want[1]}] for {channels} "
            f"channels of {height}x{width} pixels, both sides multiples of {patch_size}"
        )
    patches = tokens.reshape(-1, rows, columns, patch_size, patch_size, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


def _check_patch_size(who: str, patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"{who}: patch_size is {patch_size}, want at least 1")
