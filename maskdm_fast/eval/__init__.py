"""Evaluation: feature networks, distances with their floors, precision and recall, neighbours, grids, and the report.

The report lies in `results` (its data), `report` (HTML) and `summary` (terminal).
"""

from maskdm_fast.eval.classes import ClassScore, class_scores
from maskdm_fast.eval.distances import (
    Scores,
    compare,
    floor_split,
    frechet_distance,
    kernel_distance,
    subset_indices,
)
from maskdm_fast.eval.features import FeatureNetwork, cached_features, compute_features, load_features
from maskdm_fast.eval.grid import make_grid, save_grid
from maskdm_fast.eval.manifold import Manifold, manifold
from maskdm_fast.eval.neighbours import Copying, Neighbours, copying, nearest, neighbours_grid, real_nearest

__all__ = [
    "ClassScore",
    "Copying",
    "FeatureNetwork",
    "Manifold",
    "Neighbours",
    "Scores",
    "cached_features",
    "class_scores",
    "compare",
    "compute_features",
    "copying",
    "floor_split",
    "frechet_distance",
    "kernel_distance",
    "load_features",
    "make_grid",
    "manifold",
    "nearest",
    "neighbours_grid",
    "real_nearest",
    "save_grid",
    "subset_indices",
]
