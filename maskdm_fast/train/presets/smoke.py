"""Runs that take seconds."""

from dataclasses import replace

from maskdm_fast.diffusion.masking import NoMask, PatchMask
from maskdm_fast.models import UViTConfig
from maskdm_fast.train.config import DenoisingConfig, OutputConfig, Recipe, RunConfig
from maskdm_fast.train.presets.common import single

_PRETRAIN = DenoisingConfig(
    mask=PatchMask(0.5), num_images=640, batch_size=16, lr=1e-3, warmup_images=160, ema_half_life_images=160
)


def smoke() -> Recipe:
    """Both stages in seconds, to see that everything works. Learns nothing worth looking at."""
    return Recipe(
        stages=(("pretrain", _PRETRAIN), ("finetune", replace(_PRETRAIN, mask=NoMask()))),
        model=UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2),
        output=OutputConfig(log_images=160, checkpoint_images=320, preview_images=4),
    )


def smoke_pretrain() -> RunConfig:
    """The first stage of smoke."""
    return single(smoke(), "pretrain")
