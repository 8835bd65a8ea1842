"""Named recipes and runs. A preset is a function that returns a full configuration; command line options override it.

Names: SIZE-pretrain, SIZE-finetune and SIZE-scratch are single runs; SIZE alone is the recipe pretrain, then finetune.
"""

from collections.abc import Callable
from dataclasses import replace

from maskdm_fast.diffusion.masking import BlockMask, NoMask, PatchMask
from maskdm_fast.models import CONFIGS, UViTConfig
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, OutputConfig, Recipe, RunConfig

# Mirrored flags, letters and digits are other symbols, so the emoji presets never flip. Batches are small because a
# short run lacks steps more than it lacks images. v instead of eps: at the noisy end of the cosine schedule
# x0 = (xt - sigma eps) / alpha divides the error of eps by 5e-5, and a sampler there begins with a random picture.
_EMOJI_PRETRAIN = DenoisingConfig(
    mask=BlockMask(0.75, 4),
    num_images=150_000,
    batch_size=64,
    lr=1e-3,
    warmup_images=6_400,
    ema_half_life_images=10_000,
)
_EMOJI_UNMASKED = DenoisingConfig(
    mask=NoMask(),
    num_images=100_000,
    batch_size=32,
    lr=8e-4,
    warmup_images=3_200,
    ema_half_life_images=8_000,
)
_EMOJI_DIFFUSION = DiffusionConfig(prediction="v")
_EMOJI_OUTPUT = OutputConfig(log_images=2_000, checkpoint_images=50_000, preview_images=64)

# The ablation runs of MaskDM on CelebA 64, at 200,000 steps a stage; clipping as in its 256-pixel runs.
_SMALL_PRETRAIN = DenoisingConfig(
    mask=BlockMask(0.9, 4),
    num_images=51_200_000,
    batch_size=256,
    lr=2e-4,
    ema_half_life_images=177_000,
)
_SMALL_FINETUNE = DenoisingConfig(
    mask=NoMask(),
    num_images=25_600_000,
    batch_size=128,
    lr=2e-4,
    ema_half_life_images=88_600,
)
_SMALL_OUTPUT = OutputConfig(log_images=50_000, checkpoint_images=2_000_000, preview_images=64)
_SMALL_DIFFUSION = DiffusionConfig(schedule="linear")

_SMOKE_MODEL = UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2)
_SMOKE_PRETRAIN = DenoisingConfig(
    mask=PatchMask(0.5), num_images=640, batch_size=16, lr=1e-3, warmup_images=160, ema_half_life_images=160
)
_SMOKE_OUTPUT = OutputConfig(log_images=160, checkpoint_images=320, preview_images=4)


def emoji32() -> Recipe:
    """Emoji at 32 px on a CPU: 150,000 images with 75 % of their patches masked, then 100,000 whole."""
    return Recipe(
        stages=(("pretrain", _EMOJI_PRETRAIN), ("finetune", _EMOJI_UNMASKED)),
        model=CONFIGS["emoji32"],
        diffusion=_EMOJI_DIFFUSION,
        output=_EMOJI_OUTPUT,
    )


def emoji32_pretrain() -> RunConfig:
    """The first stage of emoji32: masked pretraining."""
    return _emoji(_EMOJI_PRETRAIN)


def emoji32_finetune() -> RunConfig:
    """The second stage of emoji32: unmasked, from the run emoji32-pretrain beside it, or the one --init-from names."""
    return _emoji(replace(_EMOJI_UNMASKED, init_from="emoji32-pretrain"))


def emoji32_scratch() -> RunConfig:
    """The baseline of emoji32: never masked, from random weights."""
    return _emoji(replace(_EMOJI_UNMASKED, num_images=140_000, lr=1e-3, warmup_images=6_400))


def small64() -> Recipe:
    """MaskDM's 44 M model at 64 px (its CelebA runs): 90 % of 4x4 blocks masked, then 0. Give --data FOLDER."""
    return Recipe(
        stages=(("pretrain", _SMALL_PRETRAIN), ("finetune", _SMALL_FINETUNE)),
        precision="bf16",
        model=CONFIGS["small64"],
        diffusion=_SMALL_DIFFUSION,
        output=_SMALL_OUTPUT,
    )


def small64_pretrain() -> RunConfig:
    """The first stage of small64: masked pretraining. Give --data FOLDER."""
    return _small(_SMALL_PRETRAIN)


def small64_finetune() -> RunConfig:
    """The second stage of small64: unmasked, from the run small64-pretrain beside it. Give --data FOLDER."""
    return _small(replace(_SMALL_FINETUNE, init_from="small64-pretrain"))


def small64_scratch() -> RunConfig:
    """The baseline of small64: never masked, from random weights. Give --data FOLDER."""
    return _small(_SMALL_FINETUNE)


def smoke() -> Recipe:
    """Both stages in seconds, to see that everything works. Learns nothing worth looking at."""
    finetune = replace(_SMOKE_PRETRAIN, mask=NoMask())
    return Recipe(
        stages=(("pretrain", _SMOKE_PRETRAIN), ("finetune", finetune)), model=_SMOKE_MODEL, output=_SMOKE_OUTPUT
    )


def smoke_pretrain() -> RunConfig:
    """The first stage of smoke."""
    return RunConfig(stage=_SMOKE_PRETRAIN, model=_SMOKE_MODEL, output=_SMOKE_OUTPUT)


def _emoji(stage: DenoisingConfig) -> RunConfig:
    return RunConfig(stage=stage, model=CONFIGS["emoji32"], diffusion=_EMOJI_DIFFUSION, output=_EMOJI_OUTPUT)


def _small(stage: DenoisingConfig) -> RunConfig:
    return RunConfig(
        stage=stage, precision="bf16", model=CONFIGS["small64"], diffusion=_SMALL_DIFFUSION, output=_SMALL_OUTPUT
    )


PRESETS: dict[str, Callable[[], RunConfig | Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        emoji32,
        emoji32_pretrain,
        emoji32_finetune,
        emoji32_scratch,
        small64,
        small64_pretrain,
        small64_finetune,
        small64_scratch,
        smoke,
        smoke_pretrain,
    )
}
"""Presets by their name on the command line."""
