"""Many images as one PNG."""

import io
import math
import os
from pathlib import Path

import numpy as np
import torch

from maskdm_fast.eval.features import Images

_GUTTER = 224


def make_grid(images: Images, columns: int | None = None, *, padding: int = 2) -> np.ndarray:
    """Lay images out row by row, with light grey gutters.

    Args:
        images: uint8 ``[n, h, w, C]``, n >= 1, C 1 or 3.
        columns: images per row; default ``ceil(sqrt(n))``.
        padding: gutter in pixels, also around the whole.

    Returns:
        uint8 ``[rows * (h + padding) + padding, columns * (w + padding) + padding, C]``.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: `images` is not ``[n >= 1, h, w, 1 or 3]``, or `columns` < 1.
    """
    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8:
        raise TypeError(f"images are {array.dtype}, want uint8")
    if array.ndim != 4 or len(array) < 1 or array.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {list(array.shape)}, want [n >= 1, h, w, 1 or 3]")
    num_images, height, width, channels = array.shape
    columns = math.ceil(math.sqrt(num_images)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}, want at least 1")
    rows = math.ceil(num_images / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, channels)
    grid = np.full(shape, _GUTTER, np.uint8)
    for index, image in enumerate(array):
        row, column = divmod(index, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def png_bytes(image: np.ndarray) -> bytes:
    """Encode uint8 ``[h, w, 1 or 3]`` as PNG.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("writing PNG files needs Pillow: pip install 'maskdm_fast[eval]'") from error
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_grid(
    images: Images, path: str | os.PathLike[str], columns: int | None = None, *, padding: int = 2, scale: int = 1
) -> None:
    """Write `make_grid` as a PNG file, each pixel repeated `scale` times in both directions; folders are made."""
    grid = make_grid(images, columns, padding=padding)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(grid.repeat(scale, axis=0).repeat(scale, axis=1)))
