"""Students of the emoji models, sized for a CPU."""

from maskdm_fast.train.config import OutputConfig, RunConfig, ScoreDistillationConfig
from maskdm_fast.train.presets.emoji import emoji32

_OUTPUT = OutputConfig(log_images=2_000, checkpoint_images=20_000, preview_images=64)


def emoji32_distill_sid() -> RunConfig:
    """A generator of one step by Score identity Distillation, from the run emoji32 beside it."""
    teacher = emoji32()
    stage = ScoreDistillationConfig(
        num_images=100_000, batch_size=32, lr=1e-4, fake_lr=1e-4, alpha=1.0, ema_half_life_images=2_000
    )
    return RunConfig(model=teacher.model, diffusion=teacher.diffusion, output=_OUTPUT, stage=stage)
