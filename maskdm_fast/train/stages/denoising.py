"""Denoising on visible patches: pretraining with a mask; fine-tuning or training from scratch without one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm_fast.diffusion import MaskedObjective
from maskdm_fast.diffusion.masking import Mask
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.costs import counts_of_mask
from maskdm_fast.train.engine import Engine
from maskdm_fast.train.metrics import Values
from maskdm_fast.train.pieces import Pieces, Reader
from maskdm_fast.train.stages.base import PREVIEW_STEPS, Batch
from maskdm_fast.train.stages.parts import (
    engine_of,
    flops_of_training,
    initial_values,
    meta_network,
    optimizer_settings,
    preview,
)
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World


class DenoisingStage:
    """Implements `Stage` with one network and the masked denoising loss.

        step:  loss = mean over the global batch of the images' losses;  AdamWEMA with gradient clipping

    Args:
        config: of the run.
        engine: holds the network.
        world: the processes.
    """

    def __init__(self, config: RunConfig, engine: Engine, world: World) -> None:
        stage = config.stage
        self._config, self._engine, self._world = config, engine, world
        self._objective = MaskedObjective(
            config.diffusion.noise_schedule(config.model),
            stage.mask,
            config.model.patch_size,
            prediction=config.diffusion.prediction,
            hflip=stage.hflip,
            label_drop=stage.label_drop,
            layout="bhwc",
            timesteps=config.diffusion.draw(stage.batch_size),
            weight=config.diffusion.weight(),
            unmasked_share=stage.unmasked_share,
        )

    @classmethod
    def build(
        cls, config: RunConfig, world: World, weights: Weights | None, teacher: Weights | None = None
    ) -> "DenoisingStage":
        values = initial_values(config, weights, world)
        engine = engine_of(config, world, meta_network(config), optimizer_settings(config), values)
        return cls(config, engine, world)

    def step(self, batches: Sequence[Batch], step: int) -> Values:
        engine = self._engine
        means = {name: torch.zeros((), device=engine.device) for name in ("loss", "mask_ratio")}
        mask = self._config.stage.mask_at(step)
        share = sum(len(batch.slots) for batch in batches)
        step_there = torch.full((), step, dtype=torch.int64, device=engine.device)
        for number, batch in enumerate(batches, start=1):
            # Each image weighs the same, so the split into micro-batches changes nothing but rounding.
            constants = (mask, len(batch.slots) / share)
            with engine.micro_batch(last=number == len(batches)):
                values = engine.run(self._micro_batch, constants, (batch.images, batch.labels, batch.slots, step_there))
            for name in means:
                means[name] += values[name]
        return {**means, **engine.step(self.lr(step))}

    def _micro_batch(self, constants: tuple[Mask, float], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Forward and backward pass; the means over the micro-batch, weighted."""
        (mask, weight), (images, labels, slots, step) = constants, tensors
        with self._world.timer.part("forward"), self._engine.autocast():
            out = self._objective(
                self._engine.model,
                images,
                labels if self._config.model.num_classes else None,
                seed=self._config.seed,
                step=step,
                slots=slots,
                mask=mask,
            )
        self._engine.backward(out["loss"] * weight)
        return {name: out[name].detach() * weight for name in ("loss", "mask_ratio")}

    def lr(self, step: int) -> float:
        return self._config.stage.lr_at(step)

    def flops_per_image(self, step: int) -> float:
        config, stage = self._config.model, self._config.stage
        side = config.image_size // config.patch_size
        return flops_of_training(config, stage.mask_at(step), stage.unmasked_share, (side, side))

    def tokens_per_image(self, step: int) -> float:
        config, stage = self._config.model, self._config.stage
        side = config.image_size // config.patch_size
        counts = counts_of_mask(stage.mask_at(step), stage.unmasked_share, (side, side))
        return config.num_extras + sum(count * share for count, share in counts)

    def preview(self, num_images: int, *, labels: Tensor | None = None, num_steps: int = PREVIEW_STEPS) -> Tensor:
        return preview(self._config, self._engine.averaged(), self._world, num_images, labels, num_steps)

    def pieces(self) -> Pieces:
        return self._engine.pieces()

    def load(self, reader: Reader) -> None:
        self._engine.load(reader)

    def close(self) -> None:
        self._engine.close()
