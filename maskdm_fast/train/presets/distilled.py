"""Students of the emoji models, sized for a CPU."""

from dataclasses import replace

from maskdm_fast.train.config import (
    OutputConfig,
    PolicyDistillationConfig,
    Recipe,
    RegressionConfig,
    RunConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.presets.emoji import emoji32
from maskdm_fast.train.regression_config import progressive_stages

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


_REGRESSION = {
    "num_images": 4_000,
    "batch_size": 32,
    "lr": 2e-4,
    "warmup_images": 320,
    "betas": (0.9, 0.99),
    "clip": 1.0,
    "even_levels": True,
    "ema_half_life_images": 500,
}


def _student(stage: ScoreDistillationConfig | RegressionConfig | PolicyDistillationConfig) -> RunConfig:
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


def emoji32_distill_progressive() -> Recipe:
    """Students of 16, 8, 4, 2 and 1 steps, each taught by the one before, the first by emoji32 (progressive)."""
    stages = progressive_stages(32, 1, teacher="../emoji32", **_REGRESSION)
    teacher = emoji32()
    return Recipe(model=teacher.model, diffusion=teacher.diffusion, output=_OUTPUT, stages=stages)


def emoji32_distill_round() -> RunConfig:
    """One round of it: 16 steps for 32 of emoji32, or --num-steps N for 2 N of --teacher (progressive)."""
    return _student(RegressionConfig(method="progressive", num_steps=16, **_REGRESSION))


def emoji32_distill_guided() -> RunConfig:
    """A student that is told how strongly to follow its category, from the run emoji32-classes beside it (guided)."""
    stage = RegressionConfig(method="guided", teacher="emoji32-classes", strengths=(0.0, 4.0), **_REGRESSION)
    return replace(_student(stage), class_conditional=True)


def emoji32_distill_consistency() -> RunConfig:
    """A student that goes from any noise level to the image, in one step or more (consistency)."""
    stage = RegressionConfig(method="consistency", images_per_stage=2_000, **_REGRESSION)
    return _student(replace(stage, num_images=16_000, lr=1e-4, clip=None, ema_half_life_images=1_000))


def emoji32_distill_dxmi() -> RunConfig:
    """A policy of ten steps and an energy that tells its images from emoji (DxMI)."""
    return _student(
        PolicyDistillationConfig(
            num_images=4_000,
            batch_size=32,
            lr=3e-6,
            sigma_lr=3e-4,
            value_lr=1e-4,
            value_width=32,
            warmup_images=640,
            num_policy_updates=2,
            ema_half_life_images=250,
        )
    )
