"""Distillation by regression: a student learns the targets of a frozen teacher, or of itself."""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskdm_fast.diffusion import Denoiser
from maskdm_fast.distill import ConsistencyDistillation
from maskdm_fast.distill.consistency import check_levels
from maskdm_fast.distill.networks import drop_labels
from maskdm_fast.distill.progressive import check_steps, check_student
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.engine import Engine
from maskdm_fast.train.generation import data_bound
from maskdm_fast.train.metrics import Values
from maskdm_fast.train.pieces import Pieces, Reader
from maskdm_fast.train.regression_config import is_told
from maskdm_fast.train.stages.base import PREVIEW_STEPS, Batch
from maskdm_fast.train.stages.parts import (
    LEVEL_NAMES,
    check_teacher,
    distance_by_level,
    engine_of,
    evaluation_flops,
    frozen_teacher,
    initial_values,
    meta_network,
    optimizer_settings,
    preview,
)
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World


class RegressionStage:
    """Implements `Stage` with one network that is trained, and a frozen teacher, if it is asked.

        step:  loss = mean over the global batch of ``weight distance(student, target)``

    ``distance`` is how far the student is from its targets, without the weight of the noise level; also by noise level,
    as ``distance/0.3-1``.

    Args:
        config: of the run.
        engine: trains the student.
        network: the student itself, which is in the engine.
        teacher: frozen, whole in every process; None if it is not asked.
        told_teacher: the teacher is told the weight of its guidance.
        world: the processes.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        network: nn.Module,
        teacher: Denoiser | None,
        told_teacher: bool,
        world: World,
    ) -> None:
        self._config, self._engine, self._world = config, engine, world
        self._evaluations = config.stage.evaluations(told_teacher=told_teacher)
        schedule = config.diffusion.noise_schedule(config.model) if teacher is None else teacher.schedule
        self._student, itself = (
            Denoiser(module, schedule, config.diffusion.prediction) for module in (engine.model, network)
        )
        method = config.stage.make(config.model, told_teacher=told_teacher)
        if teacher is not None:
            method = dataclasses.replace(method, clip=config.stage.clip_at(teacher.prediction, data_bound(config)))
        if isinstance(method, ConsistencyDistillation):
            # Its targets are asked of the module: an engine would prepare for gradients that never come.
            method = functools.partial(method, average=itself)
        self._loss = functools.partial(method, self._student, teacher)

    @classmethod
    def build(
        cls, config: RunConfig, world: World, weights: Weights | None, teacher: Weights | None = None
    ) -> "RegressionStage":
        stage = config.stage
        check_teacher(config, teacher)
        network, schedule = meta_network(config), config.diffusion.noise_schedule(config.model)
        # What could not be sampled is not trained.
        if stage.method == "consistency":
            check_levels(schedule, stage.sampling_levels)
        if stage.method == "progressive":
            check_student(Denoiser(network, schedule, config.diffusion.prediction))
            check_steps(schedule, 2 * stage.num_steps)
        values = initial_values(config, teacher if weights is None else weights, world)
        engine = engine_of(config, world, network, optimizer_settings(config), values)
        frozen = frozen_teacher(config, teacher, world) if stage.asks_teacher else None
        return cls(config, engine, network, frozen, is_told(teacher.config.stage), world)

    def step(self, batches: Sequence[Batch], step: int) -> Values:
        engine, share = self._engine, sum(len(batch.slots) for batch in batches)
        means = {name: torch.zeros((), device=engine.device) for name in ("loss", "distance")}
        bins: Tensor | float = 0.0
        for place, batch in enumerate(batches, start=1):
            weight = len(batch.slots) / share
            draw = {"seed": self._config.seed, "step": step, "slots": batch.slots}
            with engine.micro_batch(last=place == len(batches)):
                with self._world.timer.part("forward"), engine.autocast():
                    out = self._loss(batch.images, self._labels(batch, draw), **draw)
                engine.backward(out["loss"] * weight)
            distance = out["distance_per_image"]
            means["loss"] += weight * out["loss"].detach()
            means["distance"] += weight * distance.mean()
            bins = bins + distance_by_level(self._student, out["t"], distance)
        by_level = {f"distance/{name}": (bins[0, i], bins[1, i]) for i, name in enumerate(LEVEL_NAMES)}
        return {**means, **engine.step(self.lr(step)), **by_level}

    def _labels(self, batch: Batch, draw: dict) -> Tensor | None:
        if not self._config.model.num_classes:
            return None
        return drop_labels(batch.labels, self._config.stage.label_drop, **draw)

    def lr(self, step: int) -> float:
        return self._config.stage.lr_at(step)

    def flops_per_image(self, step: int) -> float:
        return self._evaluations * evaluation_flops(self._config)

    def tokens_per_image(self, step: int) -> float:
        return self._config.model.num_extras + self._config.model.num_tokens

    def preview(self, num_images: int, *, labels: Tensor | None = None, num_steps: int = PREVIEW_STEPS) -> Tensor:
        stage = self._config.stage
        return preview(
            self._config,
            self._engine.averaged(),
            self._world,
            num_images,
            labels,
            num_steps if stage.method == "guided" else None,
            guidance=1.0 + stage.strengths[0] if is_told(stage) else 1.0,
        )

    def pieces(self) -> Pieces:
        return self._engine.pieces()

    def load(self, reader: Reader) -> None:
        self._engine.load(reader)

    def close(self) -> None:
        self._engine.close()
