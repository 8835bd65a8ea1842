"""Denoising on visible patches: pretraining with a mask; fine-tuning or training from scratch without one."""

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm_fast.diffusion import MaskedObjective
from maskdm_fast.diffusion.masking import Grid, Mask
from maskdm_fast.models import TRANSFERABLE, UViT, UViTConfig, changed_fields, transfer
from maskdm_fast.models.layers import Block
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.costs import counts_of_mask, model_flops
from maskdm_fast.train.cuda_graph import check_cuda_graph
from maskdm_fast.train.engine import Engine, EngineSettings, OptimizerSettings, make_engine
from maskdm_fast.train.generation import generate
from maskdm_fast.train.pieces import Pieces, Reader
from maskdm_fast.train.stages.base import PREVIEW_STEPS, Batch
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

_SHOWN = 10


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
    def build(cls, config: RunConfig, world: World, weights: Weights | None) -> "DenoisingStage":
        stage, machine = config.stage, config.machine
        optimizer = OptimizerSettings(
            stage.betas,
            stage.weight_decay,
            stage.max_grad_norm,
            stage.ema_decay,
            stage.optimizer,
            machine.optimizer_kernel,
        )
        with torch.device("meta"):
            # An engine may cut its network in pieces; the other one keeps the shapes.
            model, shapes = UViT(config.model), UViT(config.model)
        values = functools.partial(shapes.initial_value, seed=config.seed)
        if weights is not None:
            values = _fitting(model, weights, world).__getitem__
        model.activation_checkpointing = machine.activation_checkpointing
        blocks = tuple(module for module in model.modules() if isinstance(module, Block))
        settings = EngineSettings(
            config.precision,
            len(world.micro_batches(stage.batch_size, machine.micro_batch_size)),
            blocks if machine.compile else (),
            machine.layer_norm,
            machine.cuda_graph,
        )
        if machine.cuda_graph:
            check_cuda_graph(config, world.device, machine.engine)
        return cls(config, make_engine(machine.engine, model, optimizer, settings, world, values), world)

    def step(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
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
        return _model_flops(config, stage.mask_at(step), stage.unmasked_share, (side, side))

    def tokens_per_image(self, step: int) -> float:
        config, stage = self._config.model, self._config.stage
        side = config.image_size // config.patch_size
        counts = counts_of_mask(stage.mask_at(step), stage.unmasked_share, (side, side))
        return config.num_extras + sum(count * share for count, share in counts)

    def preview(self, num_images: int, *, labels: Tensor | None = None, num_steps: int = PREVIEW_STEPS) -> Tensor:
        tensors = self._engine.averaged()
        world = self._world
        mine = torch.arange(num_images).tensor_split(world.world_size)[world.rank].tolist()

        def draw() -> Tensor | None:
            if not mine:
                return None
            return generate(
                self._config,
                tensors,
                len(mine),
                num_steps=num_steps,
                seed=self._config.seed,
                first_slot=mine[0],
                labels=None if labels is None else labels[mine],
                device=self._engine.device,
            )

        return torch.cat([images for images in world.everywhere(draw) if images is not None])

    def pieces(self) -> Pieces:
        return self._engine.pieces()

    def load(self, reader: Reader) -> None:
        self._engine.load(reader)

    def close(self) -> None:
        self._engine.close()


@functools.lru_cache(maxsize=64)
def _model_flops(config: UViTConfig, mask: Mask, unmasked_share: float, grid: Grid) -> float:
    return model_flops(config, counts_of_mask(mask, unmasked_share, grid))


def _fitting(model: UViT, weights: Weights, world: World) -> dict[str, Tensor]:
    """Trained weights, resized to the model's image and patch size; or raise ValueError naming what does not fit."""
    own, tensors = model.state_dict(), weights.tensors
    changed = changed_fields(weights.config.model, model.config)
    if changed and changed.keys() <= TRANSFERABLE:
        tensors = transfer(tensors, weights.config.model, model.config)
        words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items()))
        if world.is_main:
            print(f"the weights of {weights.checkpoint.path} were made to fit: {words}", file=sys.stderr, flush=True)
    problems = [
        f"{name}: {_shape(tensors.get(name))} there, {_shape(own.get(name))} here"
        for name in sorted(own.keys() | tensors.keys())
        if _shape(own.get(name)) != _shape(tensors.get(name))
    ]
    if "num_heads" in changed:  # the one difference that no shape shows
        problems.insert(0, "num_heads: {} there, {} here".format(*changed["num_heads"]))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"the weights of {weights.checkpoint.path} do not fit this model:{shown}{more}\n"
            "Give both runs the same model options."
        )
    return tensors


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
