"""Distillation by plain calls of the mathematics, and stages to compare with it."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import torch

from maskdm_fast import distill, random
from maskdm_fast.diffusion import Denoiser
from maskdm_fast.models import UViT
from maskdm_fast.optim import AdamWEMA
from maskdm_fast.random import Stream
from maskdm_fast.train.checkpoint import Checkpoint
from maskdm_fast.train.config import DenoisingConfig, RunConfig
from maskdm_fast.train.stages import Batch, Stage, build_stage
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

WORLD = World(torch.device("cpu"))
STEPS = 4


def teacher_of(config: RunConfig) -> Weights:
    """A network that says something, of a run that could be guided."""
    tensors = {name: 3.0 * tensor for name, tensor in UViT(config.model, seed=7).state_dict().items()}
    config = replace(config, stage=DenoisingConfig(label_drop=0.1))
    return Weights(config, tensors, Checkpoint(Path("teacher"), {}), "ema")


def build(config: RunConfig) -> Stage:
    config.validate()
    return build_stage(config, WORLD, None, teacher_of(config))


def batch_of(config: RunConfig, step: int) -> Batch:
    """The whole batch of a step."""
    size, model = config.stage.batch_size, config.model
    shape = (size, model.image_size, model.image_size, model.channels)
    images = (torch.arange(torch.Size(shape).numel()) * (31 + step) % 256).to(torch.uint8).view(shape)
    labels = (torch.arange(size) + step) % 3 if model.num_classes else torch.full((size,), -1)
    return Batch(images, labels, torch.arange(size))


def take_steps(stage: Stage, config: RunConfig, first: int = 0, last: int = STEPS) -> list[dict]:
    """The values of some steps, each in micro-batches."""
    rows = []
    for step in range(first, last):
        whole = batch_of(config, step)
        parts = [whole]
        if config.machine.micro_batch_size is not None:
            slots = WORLD.micro_batches(config.stage.batch_size, config.machine.micro_batch_size)
            parts = [Batch(whole.images[part], whole.labels[part], part) for part in slots]
        rows.append({name: clone(value) for name, value in stage.step(parts, step).items()})
    return rows


def clone(value):
    return tuple(part.clone() for part in value) if isinstance(value, tuple) else value.clone()


class ScoreByHand:
    """Score distillation without an engine: plain calls of the method and of the optimizers, on whole batches."""

    def __init__(self, config: RunConfig) -> None:
        self.config, stage = config, config.stage
        schedule = config.diffusion.noise_schedule(config.model)

        def network() -> UViT:
            model = UViT(config.model)
            model.load_state_dict(teacher_of(config).tensors)
            return model

        self.student, self.fake, self.method = network(), network(), stage.make()
        if stage.method == "dmd2" and stage.needs_images:
            self.fake = distill.Critic(self.fake, distill.CriticHead(config.model.dim, seed=config.seed))
        teacher, fake, student = (
            Denoiser(model, schedule, config.diffusion.prediction) for model in (network(), self.fake, self.student)
        )
        shape = (config.model.num_tokens, config.model.token_dim)
        generator = distill.Generator(student, shape, stage.input_levels(), stage.trained_steps)
        self.networks = distill.Networks(teacher, fake, generator)
        common = {"betas": stage.betas, "weight_decay": stage.weight_decay, "max_grad_norm": stage.max_grad_norm}
        self.optimizers = {
            self.student: AdamWEMA(self.student.parameters(), ema_decay=stage.ema_decay, **common),
            self.fake: AdamWEMA(
                self.fake.parameters(), ema_decay=None, **{**common, "betas": stage.fake_betas or stage.betas}
            ),
        }

    def _update(self, model: torch.nn.Module, out: dict, lr: float) -> float:
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(out["loss"], parameters), strict=True):
            parameter.grad = grad
        limit = self.config.stage.max_grad_value
        distill.clean_gradients(parameters, limit, limit)
        for group in self.optimizers[model].param_groups:
            group["lr"] = lr
        self.optimizers[model].step()
        return self.optimizers[model].grad_norm

    def step(self, step: int) -> dict:
        """What a stage has to log."""
        config, stage = self.config, self.config.stage
        batch = batch_of(config, step)
        labels = batch.labels if config.model.num_classes else None
        draw = {"seed": config.seed, "slots": batch.slots}
        flips = random.uniform(1, stream=Stream.FLIP, step=2 * step, **draw)[:, 0] < stage.hflip
        images = [image.flip(1) if flip else image for image, flip in zip(batch.images, flips, strict=True)]
        out = self.method.fake_loss(self.networks, labels, torch.stack(images), step=2 * step, **draw)
        values = {"loss": out["loss_per_image"].mean()}
        values["grad_norm"] = self._update(self.fake, out, stage.fake_lr or stage.lr)
        images_seen = step * stage.batch_size
        every = stage.fake_updates or self.method.fake_updates
        if step % every == every - 1 and self.method.trains_generator(images_seen):
            number = 2 * step + 1
            out = self.method.generator_loss(self.networks, labels, step=number, images_seen=images_seen, **draw)
            values["generator_loss"] = out["loss_per_image"].mean()
            values["generator_grad_norm"] = self._update(self.student, out, stage.lr)
            distances = out["distance_per_image"]
            values["distance"] = distances.mean()
            alpha, sigma = self.networks.teacher.schedule.alpha_sigma(out["t"])
            edges = (0, 0.1, 0.3, 1, 3, 10, math.inf)
            for low, high in itertools.pairwise(edges):
                inside = [low <= s / a < high for a, s in zip(alpha.tolist(), sigma.tolist(), strict=True)]
                values[f"distance/{low:g}-{high:g}"] = distances[inside].sum(), torch.tensor(float(sum(inside)))
        return values
