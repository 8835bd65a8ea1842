"""One- and few-step generators."""

import dataclasses

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import patchify
from maskdm_fast.distill import SiD, falling_levels, generate, time_of_level
from maskdm_fast.random import Stream
from tests.distill.score_toys import LABELS, SLOTS, gradients, uvit_networks

DRAW = {"seed": 5, "step": 3, "slots": SLOTS}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp", "flow", "edm"])
def test_a_generator_begins_as_its_teacher(schedule):
    """x_g = f(sigma z, t) at sigma/alpha = 2.5."""
    networks = uvit_networks(schedule, dtype=torch.float32)
    generator = dataclasses.replace(networks.generator, denoiser=networks.teacher)
    z = random.normal(4 * 48, stream=Stream.GENERATOR_NOISE, **DRAW).view(4, 4, 48)
    t = torch.tensor([time_of_level(networks.teacher.schedule, 2.5)]).expand(4)
    sigma = networks.teacher.schedule.alpha_sigma(t)[1][:, None, None]
    torch.testing.assert_close(generator(LABELS, **DRAW), networks.teacher(sigma * z, t, LABELS), rtol=1e-4, atol=1e-4)


def test_few_steps():
    levels = falling_levels(2.5, 3)
    networks = uvit_networks("edm", levels=levels)
    generator = networks.generator
    schedule = generator.denoiser.schedule
    x = torch.zeros(4, 4, 48, dtype=torch.float64)
    for k, level in enumerate(levels):
        stream, step = (Stream.SAMPLER_NOISE, 3 * 3 + k) if k else (Stream.GENERATOR_NOISE, 3)
        noise = random.normal(192, seed=5, stream=stream, step=step, slots=SLOTS, dtype=torch.float64).view(4, 4, 48)
        t = torch.full((4,), level, dtype=torch.float64)
        alpha, sigma = (scale[:, None, None] for scale in schedule.alpha_sigma(t))
        x = generator.denoiser(alpha * x + sigma * noise, t, LABELS)
    # The sinusoids of the time are float32.
    torch.testing.assert_close(generator(LABELS, **DRAW), x, rtol=1e-4, atol=1e-5)
    assert torch.equal(generator.for_training(LABELS, **DRAW), generator(LABELS, **DRAW))


def test_the_mixture_trains_one_step_at_a_time():
    networks = uvit_networks("edm", levels=falling_levels(2.5, 3), trained_steps="one")
    calls = []
    student = networks.generator.denoiser.model
    student.register_forward_hook(lambda module, inputs, out: calls.append(out.requires_grad))
    seen, images = set(), {}
    for step in range(24):
        calls.clear()
        image = networks.generator.for_training(LABELS, seed=5, step=step, slots=SLOTS)
        assert calls == [False] * (len(calls) - 1) + [True] and image.requires_grad
        # A part of the batch takes the same step, and the same images.
        part = networks.generator.for_training(LABELS[2:], seed=5, step=step, slots=SLOTS[2:])
        torch.testing.assert_close(part, image[2:])
        seen.add(len(calls) // 2)
        images[step] = image
    assert seen == {1, 2, 3}
    SiD().generator_loss(networks, LABELS, **DRAW)["loss"].backward()
    assert all(grad is not None for name, grad in gradients(student).items())


def test_images_do_not_depend_on_the_batch():
    networks = uvit_networks(dtype=torch.float32, levels=falling_levels(2.5, 2))
    shape = {"image_size": 8, "channels": 3, "patch_size": 4, "seed": 7}
    labels = torch.arange(5) % 3
    images = generate(networks.generator, num_images=5, labels=labels, batch_size=5, as_float=True, **shape)
    want = networks.generator(labels, seed=7, step=0, slots=torch.arange(5)).detach()
    torch.testing.assert_close(patchify(images.permute(0, 3, 1, 2), 4), want)
    part = generate(networks.generator, num_images=3, first_slot=2, labels=labels[2:], batch_size=2, **shape)
    assert part.dtype == torch.uint8
    torch.testing.assert_close(part, ((images[2:] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), rtol=0, atol=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "generate: num_images is 0, want at least 1"),
        ({"image_size": 16}, r"images of 16 px, 3 channels and patch_size 4 have \[16, 48\] tokens"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels has shape \[2\], want \[5\], one per image"),
    ],
)
def test_generate_refuses(changes, message):
    given = {"num_images": 5, "image_size": 8, "channels": 3, "patch_size": 4, "seed": 7, "batch_size": 5}
    with pytest.raises(ValueError, match=message):
        generate(uvit_networks().generator, **given | changes)
