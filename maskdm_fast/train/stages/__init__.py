"""The stages of training: what is learnt, by which networks, with which loss.

A new stage is one file here (a class that implements `Stage`), one configuration class in a `train/*_config.py`, which
`AnyStage` of `train/config.py` lists, and one entry in each of `STAGES`, `_PLANS` of `train/plan.py` and `_DRAW` of
`train/generation.py`. The trainer does not change.
"""

from dataclasses import replace

from maskdm_fast.train.config import (
    DenoisingConfig,
    PolicyDistillationConfig,
    RegressionConfig,
    RunConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.engine_choice import check_engine
from maskdm_fast.train.stages.base import Batch, Stage
from maskdm_fast.train.stages.denoising import DenoisingStage
from maskdm_fast.train.stages.policy import PolicyDistillationStage
from maskdm_fast.train.stages.regression import RegressionStage
from maskdm_fast.train.stages.score import ScoreDistillationStage
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

STAGES: dict[type, type[Stage]] = {
    DenoisingConfig: DenoisingStage,
    ScoreDistillationConfig: ScoreDistillationStage,
    RegressionConfig: RegressionStage,
    PolicyDistillationConfig: PolicyDistillationStage,
}
"""Which stage serves which configuration."""


def build_stage(
    config: RunConfig, world: World, weights: Weights | None = None, teacher: Weights | None = None
) -> Stage:
    """The stage that `config` asks for; arguments and errors as in `Stage.build`.

    Here the engine auto is plain, or ddp if there are several processes; `maskdm_fast.train.train` asks what fits.
    """
    if config.machine.engine == "auto":
        engine = "plain" if world.world_size == 1 else "ddp"
        config = replace(config, machine=replace(config.machine, engine=engine))
    check_engine(config, config.machine.engine, world.world_size, world.device.type)
    if isinstance(config.stage, DistillationConfig) and teacher is None:
        raise ValueError("a distillation needs a teacher")
    return STAGES[type(config.stage)].build(config, world, weights, teacher)


__all__ = [
    "STAGES",
    "Batch",
    "DenoisingStage",
    "PolicyDistillationStage",
    "RegressionStage",
    "ScoreDistillationStage",
    "Stage",
    "build_stage",
]
