"""Gaussian data and an affine generator, of which everything that score distillation does is known; and tiny U-ViTs."""

import contextlib

import torch
from torch import nn

from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, make_schedule
from maskdm_fast.diffusion.prediction import coefficients
from maskdm_fast.distill import Generator, LevelDraw, Networks
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.random import Stream

ALL = [
    (name, prediction)
    for name in ("linear", "cosine", "shifted-cosine", "vp", "flow", "edm")
    for prediction in make_schedule(name).predictions
]
TIME_OF_INPUT = {"vp": lambda t: t / 999, "flow": lambda t: t / 1000, "edm": lambda t: torch.exp(t / 100)}


def affine_denoiser(mean, cov, alpha, sigma):
    """Matrix K and vector k of ``E[x0 | xt] = K xt + k`` for data N(mean, cov) of M values."""
    eye = torch.eye(len(mean), dtype=torch.float64)
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * eye)
    return gain, mean - alpha * gain @ mean


class GaussianNetwork(nn.Module):
    """The exact denoiser of N(mean, cov), as a network that predicts what it is told to; one noise level in a batch."""

    def __init__(self, name, prediction, mean, cov):
        super().__init__()
        self.name, self.prediction, self.schedule = name, prediction, make_schedule(name)
        self.mean, self.cov = nn.Parameter(mean), nn.Parameter(cov)

    def x0(self, tokens, alpha, sigma):
        gain, shift = affine_denoiser(self.mean, self.cov, alpha, sigma)
        return (tokens.flatten(1) @ gain.T + shift).view(tokens.shape)

    def forward(self, tokens, t, ids_keep, labels):
        t = TIME_OF_INPUT.get(self.name, lambda t: t)(t[:1])
        alpha, sigma = (scale.double() for scale in self.schedule.alpha_sigma(t))
        eps_scale, x0_scale = coefficients(self.prediction, alpha, sigma)
        x0 = self.x0(tokens, alpha, sigma)
        return eps_scale * (tokens - alpha * x0) / sigma + x0_scale * x0


class AffineGenerator(GaussianNetwork):
    """``x0 = b + C z`` where the input is ``xt = sigma z``."""

    def x0(self, tokens, alpha, sigma):
        return self.mean + (tokens.flatten(1) @ self.cov.T / sigma).view(tokens.shape)


def gaussian_networks(name, prediction, mean, cov, b, c, fake=None):
    """Teacher, generator ``b + C z`` and its optimal fake network, or N(*fake), all with one kind of prediction."""
    schedule = make_schedule(name)

    def denoiser(network, mean, cov):
        return Denoiser(network(name, prediction, mean.clone(), cov.clone()), schedule, prediction)

    return Networks(
        denoiser(GaussianNetwork, mean, cov),
        denoiser(GaussianNetwork, *((b, c @ c.T) if fake is None else fake)),
        Generator(denoiser(AffineGenerator, b, c), (1, len(mean)), dtype=torch.float64),
    )


def narrow(level):
    """A draw of this noise level alone."""
    return LevelDraw("karras", level * (1 - 1e-7), level * (1 + 1e-7))


@contextlib.contextmanager
def quadrature(monkeypatch, num_values):
    """In this context the draws of z and eps are all the points of ``{-1, 1}^2M``.

    Their mean is the expectation over normal draws of any polynomial of degree 3: the losses here have degree 2.
    """
    points = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * (2 * num_values))
    parts = {Stream.GENERATOR_NOISE: points[:, :num_values], Stream.NOISE: points[:, num_values:]}

    def normal(num, *, seed, stream, step, slots, dtype=torch.float32):
        assert num == num_values and dtype == torch.float64
        return parts[stream][slots]

    with monkeypatch.context() as patch:
        patch.setattr(random, "normal", normal)
        yield {"seed": 0, "step": 0, "slots": torch.arange(len(points))}


CONFIG = UViTConfig(image_size=8, patch_size=4, dim=16, depth=5, num_heads=2, num_classes=3)
SLOTS = torch.arange(4)
LABELS = torch.tensor([0, 2, 1, -1])


def unwrapped(model):
    return model


def uvit_networks(schedule="cosine", prediction=None, *, same=False, dtype=torch.float64, wrap=unwrapped, **options):
    """Three tiny U-ViTs; teacher and fake are the `same` network or two different ones, the latter wrapped."""
    schedule = make_schedule(schedule)

    def denoiser(seed, wrap=unwrapped):
        model = UViT(CONFIG, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)  # so that the networks say something
        return Denoiser(wrap(model).to(dtype), schedule, prediction)

    generator = Generator(denoiser(1), (CONFIG.num_tokens, CONFIG.token_dim), dtype=dtype, **options)
    return Networks(denoiser(2), denoiser(2 if same else 3, wrap), generator)


def gradients(model):
    """What every parameter got, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}
