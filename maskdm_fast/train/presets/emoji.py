"""The default data set, sized for a CPU."""

from dataclasses import replace

from maskdm_fast.diffusion.masking import BlockMask, NoMask
from maskdm_fast.models import CONFIGS
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, OutputConfig, Recipe, RunConfig
from maskdm_fast.train.presets.common import single

# Mirrored flags, letters and digits are other symbols, so these presets never flip. Batches are small because a short
# run lacks steps more than it lacks images. v instead of eps: at the noisy end of the cosine schedule
# x0 = (xt - sigma eps) / alpha divides the error of eps by 5e-5, and a sampler there begins with a random picture.
_PRETRAIN = DenoisingConfig(
    mask=BlockMask(0.75, 4),
    num_images=150_000,
    batch_size=64,
    lr=1e-3,
    warmup_images=6_400,
    ema_half_life_images=10_000,
)
_UNMASKED = DenoisingConfig(
    mask=NoMask(),
    num_images=100_000,
    batch_size=32,
    lr=8e-4,
    warmup_images=3_200,
    ema_half_life_images=8_000,
)


def emoji32() -> Recipe:
    """Emoji at 32 px on a CPU: 150,000 images with 75 % of their patches masked, then 100,000 whole."""
    return Recipe(
        stages=(("pretrain", _PRETRAIN), ("finetune", _UNMASKED)),
        model=CONFIGS["emoji32"],
        diffusion=DiffusionConfig(prediction="v"),
        output=OutputConfig(log_images=2_000, checkpoint_images=50_000, preview_images=64),
    )


def emoji32_pretrain() -> RunConfig:
    """The first stage of emoji32: masked pretraining."""
    return single(emoji32(), "pretrain")


def emoji32_finetune() -> RunConfig:
    """The second stage of emoji32: unmasked, from the run emoji32-pretrain beside it, or the one --init-from names."""
    return single(emoji32(), "finetune", init_from="emoji32-pretrain")


def emoji32_scratch() -> RunConfig:
    """The baseline of emoji32: never masked, from random weights."""
    return single(emoji32(), "finetune", num_images=140_000, lr=1e-3, warmup_images=6_400)


def emoji32_classes() -> Recipe:
    """emoji32 told the category of each image, without it for one in ten (guidance), rare ones shown more often."""
    recipe = emoji32()
    stages = tuple(
        (name, replace(stage, label_drop=0.1, class_balance=0.5, num_images=stage.num_images * 3 // 2))
        for name, stage in recipe.stages
    )
    return replace(recipe, stages=stages, class_conditional=True)


def emoji64() -> Recipe:
    """emoji32's network at 64 px: four times the patches and of the work."""
    recipe = emoji32()
    return replace(recipe, model=replace(recipe.model, image_size=64))


def emoji64_transfer() -> RunConfig:
    """emoji64 begun with the weights of the run emoji32 beside it: unmasked, half as many images."""
    return single(emoji64(), "finetune", init_from="emoji32", num_images=50_000)
