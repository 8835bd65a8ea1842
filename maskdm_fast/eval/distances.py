"""Frechet and kernel distances between two sets of images, always with their floor between real images.

Letters: n generated, m reference images, d features.
"""

import dataclasses

import torch
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.eval.features import FeatureNetwork, Images, Progress, compute_features

_ROWS = 1024


class _Identity(nn.Module):
    """Lets torchmetrics take features for images, so that each image passes the network once."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` of Gaussians fitted to both sets, in float64.

    It is biased upwards, the more so the smaller the sets: compare only at equal n and m, and against the floor.

    Args:
        features: ``[n, d]``, n >= 2; n < d is fine.
        reference: ``[m, d]``, m >= 2.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: fewer than two rows, different widths, or values that are not finite.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, eq. 6.
    """
    _check(features, reference)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError("the Frechet distance needs torchmetrics: pip install 'maskdm_fast[eval]'") from error
    metric = FrechetInceptionDistance(feature=_Identity(features.shape[1]), sync_on_compute=False)
    # The covariance is a difference of sums: subtracting one shift from both sets changes no term and saves digits.
    shift = reference.double().mean(dim=0)
    metric.update(reference.double() - shift, real=True)
    metric.update(features.double() - shift, real=False)
    return float(metric.compute())


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel ``k(x, y) = (x.y / d + 1)^3``, unbiased, in float64.

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    All pairs enter. The usual estimate averages over random subsets, which torchmetrics draws from the global RNG; it
    has the same mean and more noise. Around 0, also below, where both sets have one distribution.

    Args:
        features: ``[n, d]``, n >= 2.
        reference: ``[m, d]``, m >= 2.

    Raises:
        ValueError: fewer than two rows, different widths, or values that are not finite.

    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018, section 3 and appendix.
    """
    _check(features, reference)

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        return sum(float((rows @ y.T / x.shape[1] + 1).pow(3).sum()) for rows in x.split(_ROWS))

    def mean_of_pairs(x: Tensor) -> float:
        diagonal = float((x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum())
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    a, b = features.double(), reference.double()
    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


def kernel_distances_of_splits(features: Tensor, first: Tensor) -> Tensor:
    """`kernel_distance` between the two parts of a set, for many ways to split it, with one pass over its pairs.

    Args:
        features: ``[n, d]``.
        first: bool ``[splits, n]``: the images of the first part; each part has at least 2.

    Returns:
        float64 ``[splits]``.
    """
    x, first = features.double(), first.double()
    a, b = first.T, 1 - first.T  # [n, splits]
    sums = torch.zeros(3, first.shape[0], dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel = (x[rows] @ x.T / x.shape[1] + 1).pow(3)
        kernel.diagonal(start).zero_()
        to_a, to_b = kernel @ a, kernel @ b
        sums += torch.stack([(a[rows] * to_a).sum(0), (b[rows] * to_b).sum(0), (a[rows] * to_b).sum(0)])
    num_a, num_b = a.sum(0), b.sum(0)
    aa, bb, ab = sums
    return aa / (num_a * (num_a - 1)) + bb / (num_b * (num_b - 1)) - 2 * ab / (num_a * num_b)


def _check(features: Tensor, reference: Tensor) -> None:
    for name, value in (("features", features), ("reference", reference)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"{name} has shape {list(value.shape)}, want [at least 2, d]")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if features.shape[1] != reference.shape[1]:
        widths = f"{features.shape[1]} and {reference.shape[1]}"
        raise ValueError(f"features and reference have widths {widths}: compute both with one network")


def subset_indices(num_images: int, count: int, *, seed: int) -> Tensor:
    """`count` different indices below `num_images`, int64, drawn from ``Stream.SUBSET``.

    A larger count keeps the indices of a smaller one and adds to them.

    Raises:
        ValueError: `count` is not in ``[0, num_images]``.
    """
    if not 0 <= count <= num_images:
        raise ValueError(f"count is {count}, want 0..{num_images}")
    return random.permutation(num_images, seed=seed, stream=random.Stream.SUBSET, step=0)[:count]


def floor_split(num_generated: int, num_reference: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the real images that stand for generated ones in the floor, and of the others; see `Scores`."""
    order = subset_indices(num_reference, num_reference, seed=seed)
    return order.tensor_split([min(num_generated, num_reference // 2)])


@dataclasses.dataclass(frozen=True)
class Scores:
    """Distances of generated images from a reference set, with what real images score in their place.

    The floor: ``min(n, m // 2)`` real images, drawn by `seed`, are scored against the remaining real images. It answers
    "what would a perfect generator get from this many images?" up to the reference being smaller by the images taken
    out; where n > m // 2 the floor has fewer images than the score, so it lies higher than a perfect generator would.

    Attributes:
        fd_name: "FD-lite0" or "FID".
        kid_name: "KID-lite0" or "KID".
        fd, fd_floor: Frechet distances, >= 0 up to rounding.
        kid, kid_floor: kernel distances, around 0 where nothing differs.
        num_generated, num_reference: n and m of the scores.
        floor_num_generated, floor_num_reference: sizes of the two disjoint sets of the floor.
        seed: of the split.
    """

    fd_name: str
    kid_name: str
    fd: float
    fd_floor: float
    kid: float
    kid_floor: float
    num_generated: int
    num_reference: int
    floor_num_generated: int
    floor_num_reference: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.fd_name} {self.fd:.2f} (floor {self.fd_floor:.2f}), "
            f"{self.kid_name} {self.kid:.4f} (floor {self.kid_floor:.4f}); {self.sizes}"
        )

    @property
    def sizes(self) -> str:
        """The numbers of images behind score and floor, in words."""
        return (
            f"n = {self.num_generated} generated against {self.num_reference} real; "
            f"floor: {self.floor_num_generated} real against {self.floor_num_reference} other real"
        )


def compare(
    generated: Images,
    reference: Images,
    network: FeatureNetwork,
    *,
    seed: int,
    floor: Scores | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Scores:
    """Score generated images against real ones.

    Args:
        generated: uint8 images ``[n, h, w, C]``, or their features ``[n, d]`` (float); n >= 2.
        reference: uint8 images ``[m, h, w, C]``, or their features ``[m, d]``; m >= 4.
        network: `load_features`.
        seed: picks the real images of the floor, see `Scores`.
        floor: scores of other images against the same reference, by the same network: where number and seed agree,
            their floor is taken over instead of being computed again.
        batch_size: images per pass through the network.
        progress: called with (images done, images in all), for each set that is given as images.

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError, ValueError: as `compute_features`, `frechet_distance`, or too few images.
    """
    a, b = (
        torch.as_tensor(data)
        if data.ndim == 2
        else compute_features(data, network, batch_size=batch_size, progress=progress)
        for data in (generated, reference)
    )
    if len(a) < 2 or len(b) < 4:
        raise ValueError(f"{len(a)} generated and {len(b)} reference images, want at least 2 and 4")
    held_out, rest = floor_split(len(a), len(b), seed=seed)
    if floor is None or (floor.num_generated, floor.num_reference, floor.seed) != (len(a), len(b), seed):
        floor_values = frechet_distance(b[held_out], b[rest]), kernel_distance(b[held_out], b[rest])
    else:
        floor_values = floor.fd_floor, floor.kid_floor
    return Scores(
        fd_name=network.name,
        kid_name=network.kernel_name,
        fd=frechet_distance(a, b),
        fd_floor=floor_values[0],
        kid=kernel_distance(a, b),
        kid_floor=floor_values[1],
        num_generated=len(a),
        num_reference=len(b),
        floor_num_generated=len(held_out),
        floor_num_reference=len(rest),
        seed=seed,
    )
