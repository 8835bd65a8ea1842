"""Which training images lie nearest to generated ones: shows whether a model repeats its training set."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast.eval.features import FeatureNetwork, Images, compute_features
from maskdm_fast.eval.grid import make_grid
from maskdm_fast.eval.pairs import nearest_rows

_NEAR_COPY = 0.01


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
    if network == "pixels":
        a, b = (torch.as_tensor(data).float().flatten(1) / 255 for data in (samples, reference))
    else:
        a, b = (
            F.normalize(torch.as_tensor(data).float() if data.ndim == 2 else compute_features(data, network))
            for data in (samples, reference)
        )
    indices, distances = nearest_rows(a, b, k)
    scaled = distances / a.shape[1] ** 0.5 if network == "pixels" else distances.square() / 2
    return Neighbours(indices, scaled.float())


@dataclasses.dataclass(frozen=True)
class Copying:
    """Whether samples lie nearer to the training images than new real images would.

    What new real images would do is read from the training images: each of some of them against all others.

    Attributes:
        closer: probability that a random sample lies nearer to its nearest training image than a random real image to
            its nearest other one: 0.5 for a perfect generator, towards 1 for copies; below 0.5 samples lie farther off,
            as bad images do.
        near_copies: share of samples nearer to a training image than all but 1 % of the real images are: 0.01 for a
            perfect generator.
        num_real: real images behind the comparison.
    """

    closer: float
    near_copies: float
    num_real: int


def copying(nearest_distances: Tensor, real_distances: Tensor) -> Copying:
    """The hint of memorisation from two sets of distances to the nearest training image.

        closer = mean_{i, j} [s_i < r_j] + 1/2 [s_i = r_j]        near_copies = mean_i [s_i < r's quantile of 1 %]

    Args:
        nearest_distances: s, ``[n]``: of samples to their nearest training image, see `nearest`.
        real_distances: r, ``[m]``: of real images to their nearest other one, see `real_nearest`.

    Source: Meehan, Chaudhuri, Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS
        2020, section 3, whose statistic `closer` is (there with held-out images, here leaving one out).
    """
    samples, real = nearest_distances.double(), real_distances.double().sort().values
    below, upto = torch.searchsorted(real, samples), torch.searchsorted(real, samples, right=True)
    farther_or_tied = (2 * len(real) - below - upto).double() / 2
    return Copying(
        closer=float(farther_or_tied.mean()) / len(real),
        near_copies=float((samples < real.quantile(_NEAR_COPY)).double().mean()),
        num_real=len(real),
    )


def real_nearest(reference: Tensor, chosen: Tensor) -> Neighbours:
    """The nearest other image of some images of a set.

    Args:
        reference: features ``[m, d]``, m >= 2.
        chosen: int64 ``[c]``, indices into the set.

    Returns:
        `Neighbours` with k = 1 and cosine distances.
    """
    normal = F.normalize(reference.float())
    indices, distances = nearest_rows(normal[chosen], normal, 1, own=chosen)
    return Neighbours(indices, (distances.square() / 2).float())


def neighbours_grid(samples: Images, reference: Images, found: Neighbours, num_rows: int) -> np.ndarray:
    """The samples that lie nearest to a reference image, each with its neighbours to its right.

    Args:
        samples: uint8 ``[n, h, w, C]``.
        reference: uint8 ``[m, h, w, C]`` of the same size; grey and RGB may be mixed.
        found: of the samples in the reference.
        num_rows: samples to show, at most n.

    Returns:
        uint8 ``[height, width, 1 or 3]`` as in `make_grid`: a sample per row, nearest first.
    """
    order = found.distances[:, 0].argsort(stable=True)[:num_rows]
    pictures = []
    for sample, places in zip(order.tolist(), found.indices[order].tolist(), strict=True):
        pictures += [np.asarray(samples[sample]), *(np.asarray(reference[place]) for place in places)]
    channels = max(picture.shape[-1] for picture in pictures)
    same = [np.broadcast_to(picture, (*picture.shape[:2], channels)) for picture in pictures]
    return make_grid(np.stack(same), columns=1 + found.indices.shape[1])
