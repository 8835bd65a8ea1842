"""Runs of distillation by regression that take no time, for the tests of their stage and of their students."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskdm_fast.models import UViT
from maskdm_fast.train.checkpoint import Checkpoint
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, RegressionConfig, RunConfig
from maskdm_fast.train.stage_config import StageConfig
from maskdm_fast.train.stages import Batch, RegressionStage
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

WORLD = World(torch.device("cpu"))
STEPS = 3
TOLD = (0.5, 3.0)
DRAW_CONSISTENCY = {"images_per_stage": 4, "num_stages": 3}

CASES = {
    "guided": {"method": "guided", "strengths": TOLD},
    "guided, v of eps": {"method": "guided", "strengths": TOLD, "predicts": "v", "teacher_predicts": "eps"},
    "not told": {"method": "guided", "guidance": 2.0, "predicts": "x0", "level_draw": "lognormal", "weight": "edm"},
    "not told, drops labels": {"method": "guided", "predicts": "x0", "label_drop": 0.5, "hflip": 0.5},
    "progressive": {"method": "progressive", "num_steps": 4, "num_classes": 0, "even_levels": True},
    "progressive, told": {"method": "progressive", "num_steps": 2, "strengths": TOLD, "clip": 1.0},
    "progressive, guided": {"method": "progressive", "num_steps": 1, "guidance": 3.0},
    "consistency": {**DRAW_CONSISTENCY, "path": "data", "num_classes": 0},
    "consistency of a teacher": {**DRAW_CONSISTENCY, "solver": "heun", "num_classes": 0, "schedule": "flow"},
    "consistency, told": {**DRAW_CONSISTENCY, "strengths": TOLD, "huber": 0.03, "weight": "edm"},
}


def make_run(
    make_config: Callable[..., RunConfig],
    *,
    num_classes: int = 3,
    teacher_predicts: str = "v",
    schedule: str = "cosine",
    teacher_stage: StageConfig | None = None,
    **changes,
) -> tuple[RunConfig, Weights]:
    """A run of distillation and a teacher that says something."""
    names = {field.name for field in dataclasses.fields(RegressionConfig)} & changes.keys()
    options = {"batch_size": 4, "lr": 1e-3, "num_images": 24, **{name: changes.pop(name) for name in names}}
    stage = RegressionConfig(**options)
    predicts = "flow" if schedule == "flow" else teacher_predicts
    config = make_config(diffusion=DiffusionConfig(schedule, predicts), stage=stage, **changes)
    config = replace(config, model=replace(config.model, num_classes=num_classes))
    teacher = teacher_of(replace(config, stage=teacher_stage or DenoisingConfig(label_drop=0.1)))
    config = replace(config, diffusion=replace(config.diffusion, prediction=stage.student_prediction(predicts)))
    config.validate()
    return config, teacher


def teacher_of(config: RunConfig, tensors: dict | None = None) -> Weights:
    if tensors is None:
        tensors = {name: 3.0 * tensor for name, tensor in UViT(config.model, seed=7).state_dict().items()}
    return Weights(config, tensors, Checkpoint(Path("teacher"), {}), "ema")


def student_of(config: RunConfig, stage: RegressionStage) -> Weights:
    return teacher_of(config, {name: tensor.clone() for name, tensor in stage.pieces()["model"].items()})


def batch_of(config: RunConfig, step: int) -> Batch:
    """The whole batch of a step."""
    size, model = config.stage.batch_size, config.model
    shape = torch.Size((size, model.image_size, model.image_size, model.channels))
    images = (torch.arange(shape.numel()) * (31 + step) % 256).to(torch.uint8).view(shape)
    return Batch(images, (torch.arange(size) + step) % 3, torch.arange(size))


def train(stage: RegressionStage, config: RunConfig, first: int = 0, last: int = STEPS) -> list[dict]:
    """The values of some steps, each in micro-batches."""
    rows = []
    for step in range(first, last):
        whole = batch_of(config, step)
        slots = WORLD.micro_batches(config.stage.batch_size, config.machine.micro_batch_size)
        values = stage.step([Batch(whole.images[part], whole.labels[part], part) for part in slots], step)
        rows.append({name: torch.stack(v) if isinstance(v, tuple) else v.clone() for name, v in values.items()})
    return rows


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Evaluations of networks, in forward passes on an image; with a backward pass they count three."""
    seen, forward = [], UViT.forward

    def spy(self, tokens, *arguments, **keywords):
        seen.append(len(tokens) * (3 if torch.is_grad_enabled() else 1))
        return forward(self, tokens, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(UViT, "forward", spy)
        yield seen
