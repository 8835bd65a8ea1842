"""The two losses of DMD2; their closed forms on Gaussian data are in test_sid_identities.py."""

import pytest
import torch
import torch.nn.functional as F

from maskdm_fast import random
from maskdm_fast.diffusion import Guidance, patchify
from maskdm_fast.distill import DMD2, Critic, CriticHead, GuidanceScales
from maskdm_fast.distill.critic import logits
from maskdm_fast.random import Stream
from tests.distill.score_toys import CONFIG, LABELS, SLOTS, gradients, uvit_networks

DRAW = {"seed": 5, "step": 3, "slots": SLOTS}
IMAGES = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def with_head(model):
    return Critic(model, CriticHead(CONFIG.dim, seed=4))


def make_networks():
    return uvit_networks("edm", wrap=with_head)


def noisy(networks, x, t):
    eps = random.normal(192, stream=Stream.NOISE, dtype=torch.float64, **DRAW).view(4, 4, 48)
    alpha, sigma = (scale.double()[:, None, None] for scale in networks.fake.schedule.alpha_sigma(t))
    return alpha * x + sigma * eps, alpha, sigma


@pytest.mark.parametrize("weighting", ["l1", "none"])
def test_the_generator_loss_is_that_of_the_formula(weighting):
    """1/2 |x_g - sg(x_g - g)|^2 in the mean, with g = (fake - teacher) / mean|x_g - teacher|, as the code has it."""
    method, networks, other = DMD2(weighting=weighting, adversarial=0.3), make_networks(), make_networks()
    result = method.generator_loss(networks, LABELS, **DRAW)
    result["loss"].backward()
    x_g = other.generator(LABELS, **DRAW)
    xt, _, _ = noisy(other, x_g, result["t"])
    with torch.no_grad():
        teacher, fake = (denoiser(xt, result["t"], LABELS) for denoiser in (other.teacher, other.fake))
        size = (x_g - teacher).abs().mean((1, 2), keepdim=True) if weighting == "l1" else 1.0
        g = (fake - teacher) / size
    t = method.critic_levels(other.fake.schedule, stream=Stream.CRITIC_TIMESTEP, **DRAW)
    judged = logits(other.fake, noisy(other, x_g, t)[0], t, LABELS)
    adversarial = 0.3 * F.softplus(-judged).mean()
    (0.5 * (x_g - (x_g - g).detach()).square().mean() + adversarial).backward()
    torch.testing.assert_close(result["adversarial_loss"], adversarial.detach())
    torch.testing.assert_close(result["distance_per_image"], (teacher - fake).square().mean((1, 2)))
    torch.testing.assert_close(
        *(gradients(n.generator.denoiser.model) for n in (networks, other)), rtol=1e-6, atol=1e-9
    )
    # The value is not that of the surrogate, but an estimate of the divergence.
    value = ((teacher - fake) * (teacher - x_g) / size).mean().detach()
    torch.testing.assert_close(result["matching_loss"], value)


def test_the_fake_loss_is_that_of_the_formula():
    method, networks, other = DMD2(fake_adversarial=0.3), make_networks(), make_networks()
    result = method.fake_loss(networks, LABELS, IMAGES, **DRAW)
    result["loss"].backward()
    with torch.no_grad():
        x_g = other.generator(LABELS, **DRAW)
    xt, alpha, sigma = noisy(other, x_g, result["t"])
    error = (other.fake(xt, result["t"], LABELS) - x_g).square()
    denoising = (((alpha / sigma).square() + 4) * error).mean()
    t = method.critic_levels(other.fake.schedule, stream=Stream.CRITIC_TIMESTEP, **DRAW)
    real = patchify(IMAGES.permute(0, 3, 1, 2).double() / 127.5 - 1, 4)
    of_generated, of_real = (logits(other.fake, noisy(other, x, t)[0], t, LABELS) for x in (x_g, real))
    critic = (F.softplus(of_generated) + F.softplus(-of_real)).mean()
    (denoising + 0.3 * critic).backward()
    # alpha and sigma are float32.
    torch.testing.assert_close(result["denoising_loss"], denoising.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result["critic_loss"], critic.detach())
    torch.testing.assert_close(*(gradients(n.fake.model) for n in (networks, other)), rtol=1e-5, atol=1e-5)


def test_each_network_is_guided_by_its_own_scale():
    scales = GuidanceScales(teacher=3.0, fake=1.5)
    method, networks, labels = DMD2(weighting="none", guidance=scales), make_networks(), LABELS.clamp(min=0)
    result = method.generator_loss(networks, labels, **DRAW)
    x_g, t = networks.generator(labels, **DRAW), result["t"]
    xt, _, _ = noisy(networks, x_g, t)
    teacher, fake = networks.teacher(xt, t, labels, Guidance(3.0)), networks.fake(xt, t, labels, Guidance(1.5))
    torch.testing.assert_close(result["distance_per_image"], (teacher - fake).square().mean((1, 2)).detach())
    value = ((teacher - fake) * (teacher - x_g)).mean()
    torch.testing.assert_close(result["matching_loss"], value.detach())


def test_without_a_discriminator_it_needs_neither_images_nor_a_head():
    method = DMD2(adversarial=0.0, fake_adversarial=0.0)
    assert DMD2().needs_images and not method.needs_images
    networks = uvit_networks("edm")
    assert "critic_loss" not in method.fake_loss(networks, LABELS, **DRAW)
    assert "adversarial_loss" not in method.generator_loss(networks, LABELS, **DRAW)
    with pytest.raises(ValueError, match="compares with images of the data set, but images is None"):
        DMD2().fake_loss(make_networks(), LABELS, **DRAW)


def test_refuses():
    with pytest.raises(ValueError, match="a discriminator is trained and used, or neither"):
        DMD2(adversarial=0.0)
    with pytest.raises(ValueError, match="unknown weighting 'l2'"):
        DMD2(weighting="l2")
