"""Which training images lie nearest to generated ones: shows whether a model repeats its training set."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast.eval.features import FeatureNetwork, Images, compute_features


class Neighbours(NamedTuple):
    """Nearest reference images of each sample, nearest first.

    Attributes:
        indices: int64 ``[n, k]`` into the reference set.
        distances: float32 ``[n, k]``: ``1 - cosine`` of features, or root mean square difference of pixels in [0, 1].
    """

    indices: Tensor
    distances: Tensor


def nearest(samples: Images, reference: Images, network: FeatureNetwork | Literal["pixels"], k: int = 4) -> Neighbours:
    """The `k` reference images nearest to each sample.

    Features are the better default: in pixels a copy that is shifted by one pixel lies farther away than a pale blur.
    Pixels are the stricter test for exact copies.

    Args:
        samples: uint8 images ``[n, h, w, C]``, or with a network their features ``[n, d]``.
        reference: uint8 images ``[m, h, w, C]``, or with a network their features ``[m, d]``.
        network: features by this network and cosine distance, or "pixels".
        k: neighbours per sample, 1..m.

    Raises:
        ValueError: `k` is out of range, or the sets differ in width.
    """
    if not 1 <= k <= len(reference):
        raise ValueError(f"k is {k}, want 1..{len(reference)}, the number of reference images")
    if network == "pixels":
        a, b = (torch.as_tensor(data).float().flatten(1) / 255 for data in (samples, reference))
    else:
        a, b = (
            F.normalize(torch.as_tensor(data).float() if data.ndim == 2 else compute_features(data, network))
            for data in (samples, reference)
        )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"samples have {a.shape[1]} values each, the reference {b.shape[1]}")
    # The expanded form of the distance loses digits where it is near 0, which is where a copy would show.
    squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    values, indices = squared.topk(k, largest=False)
    return Neighbours(indices, (values / a.shape[1]).sqrt() if network == "pixels" else values / 2)
