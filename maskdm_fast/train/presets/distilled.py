"""Students of the emoji models, sized for a CPU."""

from dataclasses import replace

from maskdm_fast.train.config import OutputConfig, RunConfig, ScoreDistillationConfig
from maskdm_fast.train.presets.emoji import emoji32

_OUTPUT = OutputConfig(log_images=2_000, checkpoint_images=20_000, preview_images=64)


_SID = ScoreDistillationConfig(
    num_images=24_000,
    batch_size=32,
    alpha=1.0,
    lr=5e-5,
    levels=(0.02, 24.4),
    fake_lr=2e-4,
    fake_levels=(0.002, 80.0),
    fake_level_draw="karras",
    ema_half_life_images=2_000,
)


def _student(stage: ScoreDistillationConfig) -> RunConfig:
    teacher = emoji32()
    return RunConfig(model=teacher.model, diffusion=teacher.diffusion, output=_OUTPUT, stage=stage)


def emoji32_distill_sid() -> RunConfig:
    """A generator of one step by Score identity Distillation, from the run emoji32 beside it."""
    return _student(_SID)


def emoji32_distill_sida() -> RunConfig:
    """The same with a discriminator that sees the emoji themselves (SiDA)."""
    return _student(replace(_SID, method="sida", num_images=16_000, freeze_images=320, adversarial_from=1_000))


def emoji32_distill_dmd2() -> RunConfig:
    """A generator of one step by Distribution Matching (DMD2), with a discriminator."""
    return _student(replace(_SID, method="dmd2", num_images=16_000, alpha=None, input_level=2.5, fake_updates=1))
