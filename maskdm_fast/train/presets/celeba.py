"""MaskDM's small network at 64 and 128 px: the paper's ablations on CelebA.

Its ablations are small64-pretrain with another --mask: patch, block:RATIO:2 and block:RATIO:4 at 0.1, 0.5, 0.9;
block:0.5:8; and windows crop:15, crop:11, crop:5 (12, 53 and 90 % masked).

Apart from MaskDM: bfloat16 instead of float16 with loss scaling, and a warm-up whose first step already learns. Its
code, run on several GPUs, does not average their gradients, so the batch that acted may have been smaller than stated.
"""

from dataclasses import replace

from maskdm_fast.diffusion.masking import BlockMask, NoMask
from maskdm_fast.models import CONFIGS
from maskdm_fast.train.config import DiffusionConfig, Recipe, RunConfig
from maskdm_fast.train.presets.common import PHOTO_OUTPUT, maskdm_stage, single


def small64() -> Recipe:
    """MaskDM's 44 M model at 64 px (its CelebA runs): 90 % of 4x4 blocks masked, then 0."""
    return Recipe(
        stages=(
            ("pretrain", maskdm_stage(BlockMask(0.9, 4), batch_size=256)),
            ("finetune", maskdm_stage(NoMask(), batch_size=128)),
        ),
        precision="bf16",
        model=CONFIGS["small64"],
        diffusion=DiffusionConfig(schedule="linear"),
        output=PHOTO_OUTPUT,
    )


def small64_pretrain() -> RunConfig:
    """The first stage of small64; MaskDM's ablations are other values of --mask."""
    return single(small64(), "pretrain")


def small64_finetune() -> RunConfig:
    """The second stage of small64: unmasked, from the run small64-pretrain beside it."""
    return single(small64(), "finetune", init_from="small64-pretrain")


def small64_scratch() -> RunConfig:
    """The baseline of small64: never masked, from random weights."""
    return single(small64(), "finetune")


def small128() -> Recipe:
    """small64 at 128 px with patches of 4 (the paper has it, its code does not)."""
    return replace(small64(), model=CONFIGS["small128"])


def small128_transfer() -> RunConfig:
    """small128 begun with the weights of the run small64 beside it: unmasked."""
    return single(small128(), "finetune", init_from="small64", init_weights="ema")
