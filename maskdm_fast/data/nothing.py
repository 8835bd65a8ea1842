"""A data set of labels alone, for training that makes its images itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskdm_fast.data.store import ImageRows, ImageStore
from maskdm_fast.data.store_file import LatentScaling, StoreHeader

_LEAST = 2**16


class _Zeros(ImageRows):
    def _take(self, indices: np.ndarray) -> np.ndarray:
        return np.zeros((len(indices), *self.shape[1:]), self.dtype)


def no_images(
    image_shape: tuple[int, int, int],
    class_names: Sequence[str] = (),
    *,
    latents: LatentScaling | None = None,
    bound: float = 1.0,
) -> ImageStore:
    """A store whose images are zeros, made when they are asked for, and whose classes are all equally frequent.

    Args:
        image_shape: ``(h, w, C)``.
        class_names: of the labels; none: all labels are -1.
        latents: how latents are scaled; None for images.
        bound: largest absolute value of x0.
    """
    classes = max(1, len(class_names))
    count = classes * -(-_LEAST // classes)
    name = f"no images, {len(class_names)} classes"
    header = StoreHeader((count, *image_shape), tuple(class_names), "none", name, name, (), "", latents, bound)
    labels = np.arange(count) % classes if class_names else np.full(count, -1)
    return ImageStore(Path("none"), header, _Zeros(header.shape, header.dtype), labels)
