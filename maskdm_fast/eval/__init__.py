"""Evaluation: feature networks, distances with their floors, sample grids, nearest neighbours, and the report.

The report lies in `results` (its data), `report` (HTML) and `summary` (terminal).
"""

from maskdm_fast.eval.distances import Scores, compare, frechet_distance, kernel_distance, subset_indices
from maskdm_fast.eval.features import FeatureNetwork, cached_features, compute_features, load_features
from maskdm_fast.eval.grid import make_grid, save_grid
from maskdm_fast.eval.neighbours import Neighbours, nearest

__all__ = [
    "FeatureNetwork",
    "Neighbours",
    "Scores",
    "cached_features",
    "compare",
    "compute_features",
    "frechet_distance",
    "kernel_distance",
    "load_features",
    "make_grid",
    "nearest",
    "save_grid",
    "subset_indices",
]
