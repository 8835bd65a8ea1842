"""Distances between all pairs of two sets of vectors, in pieces that fit into memory.

Letters: n rows of x, m rows of y, d values per row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_PAIRS = 1 << 22  # of one piece: 32 MiB in float64


class Nearest(NamedTuple):
    """The nearest rows of y to each row of x, nearest first: indices int64 ``[n, k]``, distances float64 ``[n, k]``."""

    indices: Tensor
    distances: Tensor


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``|x_i - y_j|^2`` in pieces of whole rows: pairs (rows of x, float64 ``[rows, m]``), in order.

    Computed as ``|x|^2 + |y|^2 - 2 x.y`` after subtracting the mean of y from both, which loses about 1e-15 of the
    largest squared norm: enough to order distances, not to tell a copy from a near copy (see `nearest_rows`).
    """
    shift = y.double().mean(dim=0)
    y = y.double() - shift
    y_squared = y.square().sum(dim=1)
    rows = max(1, _PAIRS // max(1, len(y)))
    for start in range(0, len(x), rows):
        piece = x[start : start + rows].double() - shift
        squared = torch.addmm(y_squared + piece.square().sum(dim=1)[:, None], piece, y.T, alpha=-2)
        yield slice(start, start + len(piece)), squared.clamp_(min=0)


def nearest_rows(x: Tensor, y: Tensor, k: int, *, own: Tensor | None = None) -> Nearest:
    """The `k` rows of y nearest to each row of x, by Euclidean distance.

    Args:
        x: ``[n, d]``.
        y: ``[m, d]``.
        k: how many, 1..m, or 1..m - 1 with `own`.
        own: int64 ``[n]``: row of y that is row i of x itself and is passed over, for neighbours within one set.

    Returns:
        `Nearest`; its distances are computed from the differences, so a copy is at 0.

    Raises:
        ValueError: `k` is out of range, or the widths differ.
    """
    most = len(y) - (own is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, want 1..{most}, the number of images to choose from")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples have {x.shape[1]} values each, the reference {y.shape[1]}")
    indices = torch.empty(len(x), k, dtype=torch.int64)
    distances = torch.empty(len(x), k, dtype=torch.float64)
    for rows, squared in squared_distances(x, y):
        if own is not None:
            squared.scatter_(1, own[rows, None], torch.inf)
        found = squared.topk(k, largest=False).indices
        exact = torch.stack([(x[rows].double() - y[column].double()).norm(dim=1) for column in found.T], dim=1)
        distances[rows], order = exact.sort(dim=1, stable=True)
        indices[rows] = found.gather(1, order)
    return Nearest(indices, distances)
