"""Fidelity and diversity apart: precision and recall, density and coverage.

Both pairs put a ball around every image of a set, as wide as the distance to its k-th neighbour in that set, and ask
which images of the other set lie in a ball. Letters: n generated images a, m reference images b, d features.
"""

import dataclasses

import torch
from torch import Tensor

from maskdm_fast.eval.pairs import nearest_rows, squared_distances

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


@dataclasses.dataclass(frozen=True)
class Manifold:
    """Shares of one set of images that lie near the other.

    All four depend on n and m, and real images do not reach 1: compare at equal sizes, and with what real images get.

    Attributes:
        precision: share of generated images inside a ball of the reference, 0..1. Falls with bad images.
        recall: share of reference images inside a ball of the generated ones, 0..1. Falls with missing variety.
        density: mean number of reference balls a generated image lies in, over k: like precision, but one outlier among
            the reference with its wide ball weighs little; not bounded by 1.
        coverage: share of reference balls that hold a generated image, 0..1. Like recall, but outliers among the
            generated images do not raise it.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    features: Tensor,
    reference: Tensor,
    *,
    precision_neighbours: int = PRECISION_NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
) -> Manifold:
    """Precision, recall, density and coverage of generated images.

        r_k(b_j)  = distance of b_j to its k-th neighbour among the other b
        precision = mean_i max_j [|a_i - b_j| <= r_3(b_j)]         recall   = mean_j max_i [|a_i - b_j| <= r_3(a_i)]
        density   = mean_i 1/5 sum_j [|a_i - b_j| <= r_5(b_j)]     coverage = mean_j max_i [|a_i - b_j| <= r_5(b_j)]

    Args:
        features: ``[n, d]``, n > precision_neighbours.
        reference: ``[m, d]``, m > both numbers of neighbours.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Raises:
        ValueError: too few images for k neighbours, or different widths.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
        eq. 1-2 (k = 3); Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
        eq. 3-4 (k = 5).
    """
    reference_radii = _radii(reference, sorted({precision_neighbours, density_neighbours}), "reference")
    generated_radius = _radii(features, [precision_neighbours], "generated")[precision_neighbours]
    near, wide = reference_radii[precision_neighbours], reference_radii[density_neighbours]
    inside, balls = 0, 0
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    for rows, squared in squared_distances(features, reference):
        inside += int((squared <= near).any(dim=1).sum())
        recalled |= (squared <= generated_radius[rows, None]).any(dim=0)
        in_wide = squared <= wide
        balls += int(in_wide.sum())
        covered |= in_wide.any(dim=0)
    return Manifold(
        precision=inside / len(features),
        recall=float(recalled.double().mean()),
        density=balls / (density_neighbours * len(features)),
        coverage=float(covered.double().mean()),
    )


def _radii(x: Tensor, neighbours: list[int], name: str) -> dict[int, Tensor]:
    """Squared distance of each row to its k-th neighbour, for every k of an ascending list."""
    if not 1 <= neighbours[0] <= neighbours[-1] < len(x):
        raise ValueError(f"{len(x)} {name} images, want more than the number of neighbours, {neighbours[-1]}")
    found = nearest_rows(x, x, neighbours[-1], own=torch.arange(len(x)))
    return {k: found.distances[:, k - 1].square() for k in neighbours}
