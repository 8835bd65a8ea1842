"""Classifier-free guidance of each of the three networks."""

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import Guidance
from maskdm_fast.distill import GuidanceScales, SiD
from maskdm_fast.random import Stream
from tests.distill.score_toys import LABELS, SLOTS, uvit_networks

DRAW = {"seed": 5, "step": 3, "slots": SLOTS}


def test_guidance_of_each_network():
    networks = uvit_networks()
    labels = LABELS.clamp(min=0)
    scales = GuidanceScales(teacher=2.0, fake=0.0, fake_training=1.5)
    method = SiD(weighting="none", scale=1.0, alpha=0.5, guidance=scales)
    result = method.generator_loss(networks, labels, **DRAW)
    x_g, t = networks.generator(labels, **DRAW), result["t"]
    alpha, sigma = (scale.double()[:, None, None] for scale in networks.teacher.schedule.alpha_sigma(t))
    eps = random.normal(192, stream=Stream.NOISE, dtype=torch.float64, **DRAW).view(4, 4, 48)
    xt, none = alpha * x_g + sigma * eps, torch.full_like(labels, -1)
    teacher = 2 * networks.teacher(xt, t, labels) - networks.teacher(xt, t, none)
    fake = networks.fake(xt, t, none)
    # With alpha 1/2 the loss is half the difference of two denoising losses.
    want = 0.5 * ((teacher - x_g).square() - (fake - x_g).square()).sum((1, 2))
    torch.testing.assert_close(result["loss_per_image"], want.detach())
    torch.testing.assert_close(result["distance_per_image"], (teacher - fake).square().mean((1, 2)).detach())

    result = method.fake_loss(networks, labels, **DRAW)
    alpha, sigma = (scale.double()[:, None, None] for scale in networks.fake.schedule.alpha_sigma(result["t"]))
    xt = alpha * x_g + sigma * eps
    guided = networks.fake(xt, result["t"], labels, Guidance(1.5))
    weight = (alpha / sigma).square() + 4
    torch.testing.assert_close(result["loss_per_image"], (weight * (guided - x_g).square()).sum((1, 2)).detach())


def test_guidance_modes():
    assert GuidanceScales.of_mode("none") == GuidanceScales()
    assert GuidanceScales.of_mode("teacher", 3.0) == GuidanceScales(teacher=3.0)
    assert GuidanceScales.of_mode("lsg", 1.5) == GuidanceScales(1.5, 1.5, 1.5, 0.1)
    assert GuidanceScales.of_mode("zero") == GuidanceScales(1.0, 0.0, 0.0)
    for mode, scale, message in (
        ("long", 2.0, "unknown guidance mode 'long', want one of none, teacher, lsg, zero"),
        ("zero", 2.0, "guidance mode 'zero' has no scale, but 2.0 was given; want teacher or lsg"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidanceScales.of_mode(mode, scale)


def test_dropped_labels_go_to_the_fake_network_alone():
    seen = []
    networks = uvit_networks()
    for denoiser in (networks.generator.denoiser, networks.fake):
        denoiser.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3]))
    labels, slots = torch.full((64,), 1), torch.arange(64)
    SiD(guidance=GuidanceScales(label_drop=0.5)).fake_loss(networks, labels, seed=5, step=3, slots=slots)
    of_generator, of_fake = seen
    assert torch.equal(of_generator, labels)
    assert 16 < (of_fake == -1).sum() < 48 and set(of_fake.tolist()) == {1, -1}
