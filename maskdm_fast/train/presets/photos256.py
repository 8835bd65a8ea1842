"""MaskDM's runs on photos of 256 px: CelebA-HQ, LSUN Church, and the transfer from VGGFace2 to part of CelebA-HQ.

Where they differ from MaskDM: see `presets.celeba`; and the published code does not say how long each stage was, so
each has the 200,000 steps of its README's examples.
"""

from dataclasses import replace

from maskdm_fast.diffusion.masking import BlockMask, NoMask
from maskdm_fast.models import CONFIGS
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, Recipe, RunConfig
from maskdm_fast.train.presets.common import PHOTO_OUTPUT, maskdm_stage, single

_OUTPUT = replace(PHOTO_OUTPUT, preview_images=16)
_UNSTABLE_START = {"warmup_steps": 5_000, "max_grad_norm": 1.0}
_PRETRAIN = maskdm_stage(BlockMask(0.9, 4), batch_size=256, max_grad_norm=1.0)


def celebahq_base() -> Recipe:
    """MaskDM's 102 M model on CelebA-HQ at 256 px: 90 % of 4x4 blocks masked, then 50 %, then 0."""
    return Recipe(
        stages=(
            ("pretrain90", _PRETRAIN),
            ("pretrain50", maskdm_stage(BlockMask(0.5, 4), batch_size=64, **_UNSTABLE_START)),
            ("finetune", maskdm_stage(NoMask(), batch_size=32, lr=1e-5, **_UNSTABLE_START)),
        ),
        precision="bf16",
        model=CONFIGS["base256"],
        diffusion=DiffusionConfig(schedule="cosine"),
        output=_OUTPUT,
    )


def celebahq_base_pretrain90() -> RunConfig:
    """The first stage of celebahq-base."""
    return single(celebahq_base(), "pretrain90")


def celebahq_base_pretrain50() -> RunConfig:
    """The second stage of celebahq-base, from the run celebahq-base-pretrain90 beside it."""
    return single(celebahq_base(), "pretrain50", init_from="celebahq-base-pretrain90")


def celebahq_base_finetune() -> RunConfig:
    """The last stage of celebahq-base, from the run celebahq-base-pretrain50 beside it."""
    return single(celebahq_base(), "finetune", init_from="celebahq-base-pretrain50")


def church256_base() -> RunConfig:
    """MaskDM's 102 M model on LSUN Church at 256 px: unmasked and mirrored at random; add --init-from RUN."""
    stage = maskdm_stage(NoMask(), batch_size=64, lr=1e-4, ema_decay=0.9999, hflip=0.5, **_UNSTABLE_START)
    run = celebahq_base_finetune()
    return replace(run, diffusion=DiffusionConfig(schedule="linear"), stage=stage)


def vggface2_small() -> RunConfig:
    """MaskDM's 46 M model on VGGFace2 at 256 px: 90 % of 4x4 blocks masked, to be fine-tuned on few images."""
    return _small(_PRETRAIN)


def celebahq_small() -> RunConfig:
    """vggface2-small on CelebA-HQ instead: what the transfer is compared with."""
    return _small(_PRETRAIN)


def celebahq_small_10p() -> RunConfig:
    """Unmasked on 10 % of CelebA-HQ, mirrored at random, from the run vggface2-small beside it."""
    return _few(0.1)


def celebahq_small_1p() -> RunConfig:
    """Unmasked on 1 % of CelebA-HQ, mirrored at random, from the run vggface2-small beside it."""
    return _few(0.01)


def _small(stage: DenoisingConfig) -> RunConfig:
    return replace(celebahq_base_pretrain90(), model=CONFIGS["small256"], stage=stage)


def _few(share: float) -> RunConfig:
    stage = maskdm_stage(NoMask(), batch_size=64, lr=5e-5, hflip=0.5, init_from="vggface2-small")
    return replace(_small(stage), data_share=share)
