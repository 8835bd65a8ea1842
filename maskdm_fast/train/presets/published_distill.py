"""Published distillations, for teachers of your own: give --teacher RUN, and --data FOLDER where images are needed.

What the student starts from and is sampled with is the teacher; the numbers here are those of the papers' codes for
their convolutional networks, so begin with a tenth of the images and with `maskdm-fast evaluate`. Apart from them:
bfloat16 where they have float16, which is all but CIFAR-10 (float32) and DMD2 (bfloat16); mirroring, but no other
augmentation, and no dropout; for DxMI from 64 px on Adam instead of RAdam, and gradients of the energy that are clipped
like those of the value; a moving average that remembers a growing share of the run from its start, for DMD2 and DxMI as
well, which have none. The model is only what --dry-run counts before there is a teacher.

Sources: SiD: github.com/mingyuanzhou/SiD, run_sid.sh; SiDA: its branch sida; DMD2: github.com/tianweiy/DMD2, ImageNet;
DxMI: github.com/swyoon/Diffusion-by-MaxEntIRL, whose CIFAR-10 in four steps starts from another kind of generator.
"""

from dataclasses import replace
from typing import Literal

from maskdm_fast.models import CONFIGS
from maskdm_fast.train.config import (
    NO_DATA,
    OutputConfig,
    PolicyDistillationConfig,
    RunConfig,
    ScoreDistillationConfig,
)

_OUTPUT = OutputConfig(log_images=100_000, checkpoint_images=5_000_000, preview_images=64)
_FOUR_STEPS = {
    "num_steps": 4,
    "num_policy_updates": 4,
    "rho": 4.0,
    "stochastic_last": True,
    "skip_last": 0,
    "ema_half_life_images": 500_000,
}


def _run(
    model: str, stage: ScoreDistillationConfig | PolicyDistillationConfig, precision: Literal["fp32", "bf16"] = "bf16"
) -> RunConfig:
    return RunConfig(model=CONFIGS[model], precision=precision, data=NO_DATA, output=_OUTPUT, stage=stage)


def _sida(run: RunConfig, num_images: int) -> RunConfig:
    stage = replace(run.stage, method="sida", alpha=1.0, max_grad_value=1.0, num_images=num_images, hflip=0.5)
    return replace(run, data=stage.teacher, stage=stage)


def cifar10_sid() -> RunConfig:
    """SiD on CIFAR-10: FID 1.92 with one step."""
    stage = ScoreDistillationConfig(teacher="cifar10", num_images=500_000_000, batch_size=256, lr=1e-5, alpha=1.2)
    return _run("uvit-small32", stage, "fp32")


def cifar10_classes_sid() -> RunConfig:
    """cifar10-sid with classes: FID 1.71."""
    run = cifar10_sid()
    return replace(run, stage=replace(run.stage, num_images=800_000_000), class_conditional=True)


def imagenet64_sid() -> RunConfig:
    """SiD on ImageNet at 64 px with classes: FID 1.52."""
    stage = ScoreDistillationConfig(
        teacher="imagenet64",
        num_images=1_000_000_000,
        batch_size=8192,
        lr=4e-6,
        alpha=1.2,
        ema_half_life_images=2_000_000,
    )
    return replace(_run("uvit-mid64", stage), class_conditional=True)


def ffhq64_sid() -> RunConfig:
    """SiD on FFHQ at 64 px: FID 1.55."""
    stage = ScoreDistillationConfig(
        teacher="ffhq64",
        num_images=500_000_000,
        batch_size=512,
        lr=1e-5,
        alpha=1.2,
        betas=(0.9, 0.999),
        fake_betas=(0.0, 0.999),
    )
    return _run("small64", stage)


def afhqv2_64_sid() -> RunConfig:
    """SiD on AFHQv2 at 64 px: FID 1.63."""
    stage = ScoreDistillationConfig(teacher="afhqv2-64", num_images=500_000_000, batch_size=512, lr=5e-6, alpha=1.0)
    return _run("small64", stage)


def cifar10_sida() -> RunConfig:
    """SiDA on CIFAR-10: FID 1.50."""
    return _sida(cifar10_sid(), 300_000_000)


def cifar10_classes_sida() -> RunConfig:
    """cifar10-sida with classes: FID 1.40."""
    return _sida(cifar10_classes_sid(), 300_000_000)


def imagenet64_sida() -> RunConfig:
    """SiDA on ImageNet at 64 px with classes: FID 1.11."""
    return _sida(imagenet64_sid(), 300_000_000)


def ffhq64_sida() -> RunConfig:
    """SiDA on FFHQ at 64 px: FID 1.04."""
    return _sida(ffhq64_sid(), 200_000_000)


def afhqv2_64_sida() -> RunConfig:
    """SiDA on AFHQv2 at 64 px: FID 1.28."""
    return _sida(afhqv2_64_sid(), 200_000_000)


def imagenet64_dmd2() -> RunConfig:
    """DMD2 on ImageNet at 64 px with classes: FID 1.51, and 1.28 after a longer run."""
    stage = ScoreDistillationConfig(
        method="dmd2",
        teacher="imagenet64",
        num_images=56_000_000,
        batch_size=280,
        lr=2e-6,
        warmup_images=140_000,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        max_grad_norm=10.0,
    )
    return replace(_run("uvit-mid64", stage), class_conditional=True, data="imagenet64")


def cifar10_dxmi() -> RunConfig:
    """DxMI on CIFAR-10: FID 3.19 in ten steps."""
    stage = PolicyDistillationConfig(teacher="cifar10", num_images=10_000_000, batch_size=128, hflip=0.5)
    return replace(_run("uvit-small32", stage, "fp32"), data="cifar10")


def imagenet64_dxmi() -> RunConfig:
    """DxMI on ImageNet at 64 px with classes: FID 2.68 in ten steps."""
    stage = PolicyDistillationConfig(
        teacher="imagenet64",
        num_images=1_280_000,
        batch_size=128,
        hflip=0.5,
        policy="ve",
        skip_last=3,
        num_policy_updates=10,
        lr=1e-8,
        max_grad_norm=None,
        value_max_grad_norm=0.1,
        ema_half_life_images=50_000,
    )
    return replace(_run("uvit-mid64", stage), class_conditional=True, data="imagenet64")


def imagenet64_dxmi4() -> RunConfig:
    """imagenet64-dxmi in four steps: FID 3.21."""
    run = imagenet64_dxmi()
    return replace(run, stage=replace(run.stage, num_images=12_800_000, **_FOUR_STEPS))


def lsun_bedroom256_dxmi() -> RunConfig:
    """DxMI on LSUN Bedroom at 256 px: FID 5.93 in four steps."""
    stage = imagenet64_dxmi().stage
    stage = replace(stage, teacher="lsun-bedroom256", num_images=6_400_000, batch_size=64, **_FOUR_STEPS)
    return replace(_run("base256", stage), data="lsun-bedroom256")
