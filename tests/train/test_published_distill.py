"""Presets of published distillations hold the numbers of their papers' codes, written out."""

import pytest

from maskdm_fast.train import PRESETS

MILLION = 1_000_000
ADAM, MOMENTUM = (0.0, 0.999), (0.9, 0.999)
# num_images, batch_size, lr, alpha, betas, fake_betas, ema_half_life_images, precision where theirs is float16.
SID = {
    "cifar10-sid": (500 * MILLION, 256, 1e-5, 1.2, ADAM, None, MILLION // 2, "fp32"),
    "cifar10-classes-sid": (800 * MILLION, 256, 1e-5, 1.2, ADAM, None, MILLION // 2, "fp32"),
    "imagenet64-sid": (1000 * MILLION, 8192, 4e-6, 1.2, ADAM, None, 2 * MILLION, "bf16"),
    "ffhq64-sid": (500 * MILLION, 512, 1e-5, 1.2, MOMENTUM, ADAM, MILLION // 2, "bf16"),
    "afhqv2-64-sid": (500 * MILLION, 512, 5e-6, 1.0, ADAM, None, MILLION // 2, "bf16"),
}
SIDA_IMAGES = {"cifar10": 300, "cifar10-classes": 300, "imagenet64": 300, "ffhq64": 200, "afhqv2-64": 200}
# num_steps, num_images, batch_size, lr, max_grad_norm, value_max_grad_norm, num_policy_updates, skip_last, precision.
DXMI = {
    "cifar10-dxmi": (10, 10 * MILLION, 128, 1e-7, 0.1, None, 1, 0, "fp32"),
    "imagenet64-dxmi": (10, 1_280_000, 128, 1e-8, None, 0.1, 10, 3, "bf16"),
    "imagenet64-dxmi4": (4, 12_800_000, 128, 1e-8, None, 0.1, 4, 0, "bf16"),
    "lsun-bedroom256-dxmi": (4, 6_400_000, 64, 1e-8, None, 0.1, 4, 0, "bf16"),
}


def numbers(preset, *names):
    run = PRESETS[preset]()
    return (*(getattr(run.stage, name) for name in names), run.precision)


@pytest.mark.parametrize("preset", SID)
def test_sid(preset):
    names = ("num_images", "batch_size", "lr", "alpha", "betas", "fake_betas", "ema_half_life_images")
    assert numbers(preset, *names) == SID[preset]
    stage = PRESETS[preset]().stage
    assert (stage.method, stage.fake_lr, stage.max_grad_value, stage.weight_decay) == ("sid", None, 1e5, 0.0)
    assert (stage.warmup_images, stage.max_grad_norm, stage.hflip) == (0, None, 0.0)


@pytest.mark.parametrize("name", SIDA_IMAGES)
def test_sida(name):
    """As SiD, with alpha 1, fewer images, and gradients cut to 1."""
    stage = PRESETS[f"{name}-sida"]().stage
    assert (stage.method, stage.alpha, stage.max_grad_value) == ("sida", 1.0, 1.0)
    assert stage.num_images == SIDA_IMAGES[name] * MILLION
    kept = ("batch_size", "lr", "betas", "fake_betas", "ema_half_life_images")
    assert numbers(f"{name}-sida", *kept) == numbers(f"{name}-sid", *kept)


def test_dmd2():
    names = ("batch_size", "lr", "warmup_images", "betas", "weight_decay", "max_grad_norm", "num_fake_updates")
    wanted = (280, 2e-6, 500 * 280, MOMENTUM, 0.01, 10.0, 5, "bf16")
    assert numbers("imagenet64-dmd2", *names) == wanted
    stage = PRESETS["imagenet64-dmd2"]().stage
    assert stage.num_images == 200_000 * 280 and stage.input_levels() == (80.0,)


@pytest.mark.parametrize("preset", DXMI)
def test_dxmi(preset):
    names = ("num_steps", "num_images", "batch_size", "lr", "max_grad_norm", "value_max_grad_norm")
    assert numbers(preset, *names, "num_policy_updates", "skip_last") == DXMI[preset]
    stage = PRESETS[preset]().stage
    assert (stage.value_lr, stage.tau_entropy, stage.tau_velocity, stage.hflip) == (1e-5, 0.1, 0.01, 0.5)
    assert stage.sigma_lr_at(0) == pytest.approx(100 * stage.lr)
    of_four_steps = (4.0, True) if stage.num_steps == 4 else (None, False)
    assert (stage.rho, stage.stochastic_last) == of_four_steps
    assert stage.policy == ("ddpm" if preset == "cifar10-dxmi" else "ve")
