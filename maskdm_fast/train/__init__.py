"""Training: configurations, presets, the loop, checkpoints."""

from maskdm_fast.train.checkpoint import CheckpointError
from maskdm_fast.train.config import Recipe, RunConfig
from maskdm_fast.train.metrics import TrainingDivergedError, read_metrics
from maskdm_fast.train.presets import PRESETS
from maskdm_fast.train.runs import train, train_recipe
from maskdm_fast.train.trainer import TrainResult
from maskdm_fast.train.weights import Weights, export, load_weights

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Recipe",
    "RunConfig",
    "TrainResult",
    "TrainingDivergedError",
    "Weights",
    "export",
    "load_weights",
    "read_metrics",
    "train",
    "train_recipe",
]
