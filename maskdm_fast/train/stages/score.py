"""Score distillation: a generator of one or few steps and a fake network, trained in turn under a frozen teacher."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser
from maskdm_fast.distill import Alternation, Critic, CriticHead, Generator, Method, Networks, frozen
from maskdm_fast.distill.costs import evaluations
from maskdm_fast.models import UViT
from maskdm_fast.random import Stream
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.engine import Values as EngineValues
from maskdm_fast.train.metrics import Values
from maskdm_fast.train.pieces import Pieces, Reader, Renamed
from maskdm_fast.train.stages.base import PREVIEW_STEPS, Batch
from maskdm_fast.train.stages.parts import (
    LEVEL_NAMES,
    Trained,
    check_teacher,
    distance_by_level,
    engine_of,
    evaluation_flops,
    frozen_teacher,
    initial_values,
    mean_of_processes,
    meta_network,
    optimizer_settings,
    preview,
)
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

FAKE = "fake_"
"""Begins the names of the fake network's groups in a checkpoint."""


class ScoreDistillationStage:
    """Implements `Stage` with three networks, of which the frozen teacher has no engine.

        step:  fake network:  loss = mean over the global batch of `Method.fake_loss`
               generator, in every step number fake_updates:  likewise of `Method.generator_loss`

    ``loss`` is the fake network's: that of the generator is no sign of convergence (`SiD`), but ``distance`` is, the
    mean square of the difference between teacher and fake; also by noise level, as ``distance/0.3-1``.

    Args:
        config: of the run.
        generator: with the moving average, which is what is sampled.
        fake: the network of the generator's images.
        teacher: frozen, whole in every process.
        world: the processes.
    """

    def __init__(self, config: RunConfig, generator: Trained, fake: Trained, teacher: Denoiser, world: World) -> None:
        stage = config.stage
        self._config, self._world, self._teacher = config, world, teacher
        self._generator, self._fake = generator, fake
        self._method: Method = stage.make()
        self._alternation = Alternation(stage.num_fake_updates)
        # What is not trained in an update is called by itself: an engine would prepare for its gradients.
        self._in_fake_update = self._networks(fake.engine.model, generator.module)
        self._in_generator_update = self._networks(fake.module, generator.engine.model)
        for player in (self._generator, self._fake):
            player.engine.rest()

    def _networks(self, fake: nn.Module, generator: nn.Module) -> Networks:
        model, stage = self._config.model, self._config.stage

        def denoiser(module: nn.Module) -> Denoiser:
            return dataclasses.replace(self._teacher, model=module)

        shape = (model.num_tokens, model.token_dim)
        student = Generator(denoiser(generator), shape, stage.input_levels(), stage.trained_steps)
        return Networks(self._teacher, denoiser(fake), student)

    @classmethod
    def build(
        cls, config: RunConfig, world: World, weights: Weights | None, teacher: Weights | None = None
    ) -> "ScoreDistillationStage":
        check_teacher(config, teacher)
        stage = config.stage
        max_grad_value = None if config.precision == "fp16" else stage.max_grad_value
        settings = dataclasses.replace(optimizer_settings(config), max_grad_value=max_grad_value)
        of_teacher = initial_values(config, teacher, world)
        student = meta_network(config)
        values = of_teacher if weights is None else initial_values(config, weights, world)
        generator = Trained(engine_of(config, world, student, settings, values), student)
        fake, values = meta_network(config), of_teacher
        if stage.method == "dmd2" and stage.make().needs_images:
            fake, values = _with_head(fake, values, config.seed)
        settings = dataclasses.replace(settings, ema_decay=None, betas=stage.fake_betas or stage.betas)
        return cls(
            config,
            generator,
            Trained(engine_of(config, world, fake, settings, values), fake),
            frozen_teacher(config, teacher, world),
            world,
        )

    def step(self, batches: Sequence[Batch], step: int) -> Values:
        number, images_seen = self._alternation.fake_number(step), step * self._config.stage.batch_size

        def fake_loss(batch: Batch, labels: Tensor | None, draw: dict) -> dict[str, Tensor]:
            images = self._mirrored(batch.images, **draw) if self._method.needs_images else None
            return self._method.fake_loss(self._in_fake_update, labels, images, **draw)

        def generator_loss(batch: Batch, labels: Tensor | None, draw: dict) -> dict[str, Tensor]:
            return self._method.generator_loss(self._in_generator_update, labels, images_seen=images_seen, **draw)

        values = self._update(self._fake, self._generator, fake_loss, batches, number, self.fake_lr(step))
        if "loss_scale" in values:
            values["fake_loss_scale"] = values.pop("loss_scale")
        if self._trains_generator(step):
            number = self._alternation.generator_number(step)
            found = self._update(self._generator, self._fake, generator_loss, batches, number, self.lr(step))
            if "skipped" in values:
                found["skipped"] = torch.maximum(values["skipped"], found["skipped"])
            names = {"loss": "generator_loss", "grad_norm": "generator_grad_norm"}
            values |= {names.get(name, name): value for name, value in found.items()}
        return values

    def _mirrored(self, images: Tensor, **draw: Any) -> Tensor:
        """Images of the data set, some of them mirrored, as the run wishes."""
        hflip = self._config.stage.hflip
        if not hflip:
            return images
        u = random.uniform(1, stream=Stream.FLIP, **draw)
        return torch.where((u < hflip)[:, :, None, None], images.flip(2), images)

    def _trains_generator(self, step: int) -> bool:
        images_seen = step * self._config.stage.batch_size
        return self._alternation.trains_generator(step) and self._method.trains_generator(images_seen)

    def _update(
        self,
        player: Trained,
        idle: Trained,
        loss: Callable[[Batch, Tensor | None, dict], dict[str, Tensor]],
        batches: Sequence[Batch],
        number: int,
        lr: float,
    ) -> Values:
        """One optimizer step of one network while the other one is idle; the means of its values."""
        engine, share = player.engine, sum(len(batch.slots) for batch in batches)
        means: dict[str, Tensor] = {}
        bins: Tensor | None = None
        for place, batch in enumerate(batches, start=1):
            weight = len(batch.slots) / share
            draw = {"seed": self._config.seed, "step": number, "slots": batch.slots}
            labels = batch.labels if self._config.model.num_classes else None
            # Until after the backward pass, in which checkpointed blocks are computed again.
            with engine.micro_batch(last=place == len(batches)), frozen(idle.module):
                with self._world.timer.part("forward"), engine.autocast():
                    out = loss(batch, labels, draw)
                engine.backward(out.pop("loss") * weight)
            out["loss"] = out.pop("loss_per_image").mean()
            t, distance = out.pop("t"), out.pop("distance_per_image", None)
            if distance is not None:
                out["distance"] = distance.mean()
                found = distance_by_level(self._teacher, t, distance)
                bins = found if bins is None else bins + found
            for name, value in out.items():
                means[name] = means.get(name, 0.0) + weight * value.detach()
        if "finite_share" in means:
            # A generator that makes no image at all any more has no loss either.
            finite = mean_of_processes(means["finite_share"], self._world) > 0
            means["loss"] = torch.where(finite, means["loss"], torch.nan)
        player.engine.wake()
        values: Values = {**means, **engine.step(lr)}
        player.engine.rest()
        if bins is not None:
            values |= {f"distance/{name}": (bins[0, i], bins[1, i]) for i, name in enumerate(LEVEL_NAMES)}
        return values

    def lr(self, step: int) -> float:
        return self._config.stage.lr_at(step)

    def fake_lr(self, step: int) -> float:
        """Learning rate of the fake network, as `lr`."""
        stage = self._config.stage
        return self.lr(step) if stage.fake_lr is None else stage.warm(stage.fake_lr, step)

    def flops_per_image(self, step: int) -> float:
        found = evaluations(self._method, self._in_fake_update.generator)
        trained = self._trains_generator(step)
        return (found.fake + (found.generator if trained else 0.0)) * evaluation_flops(self._config)

    def tokens_per_image(self, step: int) -> float:
        return self._config.model.num_extras + self._config.model.num_tokens

    def preview(self, num_images: int, *, labels: Tensor | None = None, num_steps: int = PREVIEW_STEPS) -> Tensor:
        return preview(self._config, self._generator.engine.averaged(), self._world, num_images, labels)

    def pieces(self) -> Pieces:
        fake = {f"{FAKE}{group}": pieces for group, pieces in self._fake.engine.pieces().items() if pieces}
        return {**self._generator.engine.pieces(), **fake}

    def load(self, reader: Reader) -> None:
        self._generator.engine.load(reader)
        self._fake.engine.load(Renamed(reader, FAKE))
        for player in (self._generator, self._fake):
            player.engine.rest()

    def close(self) -> None:
        self._generator.engine.close()
        self._fake.engine.close()


def _with_head(fake: UViT, values: EngineValues, seed: int) -> tuple[Critic, EngineValues]:
    """The fake network with a discriminator's head, and where both begin."""
    drawn = CriticHead(fake.config.dim, seed=seed).state_dict()
    with torch.device("meta"):
        critic = Critic(fake, CriticHead(fake.config.dim))

    def value(name: str) -> Tensor:
        part, _, rest = name.partition(".")
        return drawn[rest] if part == "head" else values(rest)

    return critic, value
