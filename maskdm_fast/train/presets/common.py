"""What presets are made from."""

import math
from dataclasses import fields, replace

from maskdm_fast.diffusion.masking import Mask
from maskdm_fast.train.config import DenoisingConfig, OutputConfig, Recipe, RunConfig, SharedConfig

PHOTO_OUTPUT = OutputConfig(log_images=50_000, checkpoint_images=2_000_000, preview_images=64)
"""For runs of many millions of images."""


def single(recipe: Recipe, stage: str, **changes) -> RunConfig:
    """One stage of a recipe as a run of its own, with `changes` of the stage."""
    shared = {field.name: getattr(recipe, field.name) for field in fields(SharedConfig)}
    return RunConfig(**shared, stage=replace(dict(recipe.stages)[stage], **changes))


def maskdm_stage(
    mask: Mask,
    batch_size: int,
    *,
    lr: float = 2e-4,
    steps: int = 200_000,
    warmup_steps: int = 0,
    ema_decay: float = 0.999,
    **options,
) -> DenoisingConfig:
    """A stage in the terms of MaskDM's configuration files, which count steps and state the EMA's decay per step.

    Gradients are not clipped and images not mirrored unless `options` (of `DenoisingConfig`) say so. A stage goes on
    with the trained weights of the one before it, not with their average, as there.

    Source: github.com/jiachenlei/maskdm, configs/ and main.py.
    """
    return DenoisingConfig(
        **{
            "mask": mask,
            "num_images": steps * batch_size,
            "batch_size": batch_size,
            "lr": lr,
            "warmup_images": warmup_steps * batch_size,
            "betas": (0.99, 0.99),
            "weight_decay": 0.03,
            "max_grad_norm": None,
            "ema_half_life_images": round(batch_size * math.log(0.5) / math.log(ema_decay)),
            "init_weights": "raw",
            **options,
        }
    )
