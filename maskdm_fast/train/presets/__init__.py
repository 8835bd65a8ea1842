"""Named recipes and runs. A preset is a function that returns a full configuration; command line options override it.

Names: SIZE-pretrain, SIZE-finetune and SIZE-scratch are single runs; SIZE alone is the recipe pretrain, then finetune.
A new preset is a function in the file of its family, and its name in `FAMILIES`.
"""

from collections.abc import Callable

from maskdm_fast.train.config import Recipe, RunConfig
from maskdm_fast.train.presets import celeba, distilled, emoji, photos256, published_distill, smoke

Preset = Callable[[], RunConfig | Recipe]

FAMILIES: dict[str, tuple[Preset, ...]] = {
    "emoji, on a CPU": (
        emoji.emoji32,
        emoji.emoji32_pretrain,
        emoji.emoji32_finetune,
        emoji.emoji32_scratch,
        emoji.emoji32_classes,
        emoji.emoji64,
        emoji.emoji64_transfer,
    ),
    "emoji in few steps, from the run emoji32 or emoji32-classes beside them": (
        distilled.emoji32_distill_sid,
        distilled.emoji32_distill_sida,
        distilled.emoji32_distill_dmd2,
        distilled.emoji32_distill_progressive,
        distilled.emoji32_distill_round,
        distilled.emoji32_distill_guided,
        distilled.emoji32_distill_consistency,
        distilled.emoji32_distill_dxmi,
    ),
    "photos at 64 and 128 px, as MaskDM on CelebA (give --data FOLDER)": (
        celeba.small64,
        celeba.small64_pretrain,
        celeba.small64_finetune,
        celeba.small64_scratch,
        celeba.small128,
        celeba.small128_transfer,
    ),
    "photos at 256 px, as MaskDM (give --data FOLDER)": (
        photos256.celebahq_base,
        photos256.celebahq_base_pretrain90,
        photos256.celebahq_base_pretrain50,
        photos256.celebahq_base_finetune,
        photos256.church256_base,
        photos256.vggface2_small,
        photos256.celebahq_small,
        photos256.celebahq_small_10p,
        photos256.celebahq_small_1p,
    ),
    "published distillations, of teachers of your own (give --teacher RUN; but for SiD --data FOLDER)": (
        published_distill.cifar10_sid,
        published_distill.cifar10_classes_sid,
        published_distill.imagenet64_sid,
        published_distill.ffhq64_sid,
        published_distill.afhqv2_64_sid,
        published_distill.cifar10_sida,
        published_distill.cifar10_classes_sida,
        published_distill.imagenet64_sida,
        published_distill.ffhq64_sida,
        published_distill.afhqv2_64_sida,
        published_distill.imagenet64_dmd2,
        published_distill.cifar10_dxmi,
        published_distill.imagenet64_dxmi,
        published_distill.imagenet64_dxmi4,
        published_distill.lsun_bedroom256_dxmi,
    ),
    "to see that everything works": (smoke.smoke, smoke.smoke_pretrain),
}
"""Presets by what they are for, in the order of the help text."""

PRESETS: dict[str, Preset] = {
    function.__name__.replace("_", "-"): function for functions in FAMILIES.values() for function in functions
}
"""Presets by their name on the command line."""
