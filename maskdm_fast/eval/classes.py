"""Scores per class, for images whose class is known.

A Frechet distance of one class would be mostly bias: with n images of a class and d features, n < d, its floor dwarfs
what is to be seen. The kernel distance has no bias, and its spread is told beside it.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.eval.distances import kernel_distance, kernel_distances_of_splits

_SPLITS = 20


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """How one class was drawn.

    Attributes:
        name: of the class.
        num_generated, num_reference: images of it.
        agreement: share of its generated images whose nearest real image, of all classes, is of this class.
        agreement_real: the same of the real images of the class, each against all others.
        kid: kernel distance between generated and real images of the class; None below 2 of either.
        kid_spread: standard deviation of what real images of the class get in place of the generated ones, around 0:
            a `kid` within two of it says nothing. None where the class has fewer than 4 real images, or 2 generated.
    """

    name: str
    num_generated: int
    num_reference: int
    agreement: float | None
    agreement_real: float | None
    kid: float | None
    kid_spread: float | None


def class_scores(
    features: Tensor,
    labels: Tensor,
    reference: Tensor,
    reference_labels: Tensor,
    *,
    nearest: Tensor,
    real_nearest: Tensor,
    real_chosen: Tensor,
    class_names: Sequence[str],
    seed: int,
) -> list[ClassScore]:
    """Score every class by itself.

    Args:
        features: of the generated images, ``[n, d]``.
        labels: their classes, int64 ``[n]``.
        reference: of the real images, ``[m, d]``.
        reference_labels: their classes, int64 ``[m]``.
        nearest: int64 ``[n]``, the nearest real image of each generated one.
        real_nearest: int64 ``[c]``, the nearest other real image of each of `real_chosen`.
        real_chosen: int64 ``[c]``, indices into the real images.
        class_names: names in the order of the labels.
        seed: of the splits behind `kid_spread`.

    Returns:
        One `ClassScore` per class that has generated or real images.
    """
    right = reference_labels[nearest] == labels
    real_right = reference_labels[real_nearest] == reference_labels[real_chosen]
    scores = []
    for label, name in enumerate(class_names):
        drawn, real = labels == label, reference_labels == label
        asked = reference_labels[real_chosen] == label
        a, b = features[drawn], reference[real]
        if len(a) + len(b) == 0:
            continue
        enough = len(a) >= 2 and len(b) >= 2
        scores.append(
            ClassScore(
                name=name,
                num_generated=len(a),
                num_reference=len(b),
                agreement=_share(right[drawn]),
                agreement_real=_share(real_right[asked]),
                kid=kernel_distance(a, b) if enough else None,
                kid_spread=_spread(b, min(len(a), len(b) // 2), seed) if enough and len(b) >= 4 else None,
            )
        )
    return scores


def _share(right: Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None


def _spread(real: Tensor, count: int, seed: int) -> float:
    """Root mean square kernel distance of `count` real images to the others, over random splits."""
    first = torch.zeros(_SPLITS, len(real), dtype=torch.bool)
    for split, row in enumerate(first):
        order = random.permutation(len(real), seed=seed, stream=random.Stream.SUBSET, step=split)
        row[order[:count]] = True
    return float(kernel_distances_of_splits(real, first).square().mean().sqrt())
