"""Data of which everything is known: independent values N(MEAN, STD^2), their denoiser and their samplers' results."""

from types import SimpleNamespace

import pytest
import torch

from maskdm_fast.diffusion import make_schedule
from maskdm_fast.diffusion.prediction import coefficients

MEAN = torch.linspace(-0.6, 0.6, 16, dtype=torch.float64).view(4, 4)  # of each value of the tokens [N, P*P*C]
STD = torch.linspace(0.15, 0.6, 16, dtype=torch.float64).view(4, 4)

TIME_OF_INPUT = {
    "scaled-linear": lambda t: t - 1,
    "vp": lambda t: t / 999,
    "flow": lambda t: t / 1000,
    "edm": lambda t: torch.exp(t / 100),
}


def gain(alpha, sigma):
    """``E[x0 | xt] = m + gain (xt - alpha m)``."""
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)


class GaussianNetwork:
    """The exact denoiser on the schedule `name` of images of 128 px, as a network that predicts what it is told to."""

    def __init__(self, name, prediction="x0"):
        self.name, self.prediction, self.schedule = name, prediction, make_schedule(name, 128)

    def __call__(self, tokens, t, ids_keep, labels):
        assert ids_keep is None
        t = TIME_OF_INPUT.get(self.name, lambda t: t)(t.double())
        alpha, sigma = (scale[:, None, None] for scale in self.schedule.alpha_sigma(t))
        x0 = MEAN + gain(alpha, sigma) * (tokens - alpha * MEAN)
        eps_scale, x0_scale = coefficients(self.prediction, alpha, sigma)
        return (eps_scale * (tokens - alpha * x0) / sigma + x0_scale * x0).float()


def chain(schedule, transitions):
    """What a sampler does to standard normal noise z under the exact denoiser: ``slope z + shift + N(0, var)``.

    The variance is right for samplers that use no earlier estimate.
    """
    times = torch.tensor([step.t for step in transitions], dtype=torch.float64)
    alphas, sigmas = (scale[:, None, None] for scale in schedule.alpha_sigma(times))
    slope, shift, var = sigmas[0].expand_as(MEAN), torch.zeros_like(MEAN), torch.zeros_like(MEAN)
    last = slope, shift
    for step, alpha, sigma in zip(transitions, alphas, sigmas, strict=True):
        g = gain(alpha, sigma)
        x0 = g * slope, MEAN + g * (shift - alpha * MEAN)
        slope, shift = (
            step.c_x0 * now + step.c_xt * x + step.c_last * before
            for now, x, before in zip(x0, (slope, shift), last, strict=True)
        )
        var = (step.c_x0 * g + step.c_xt) ** 2 * var + step.std**2
        last = x0
    return slope, shift, var


def exact(schedule, first, last):
    """The probability-flow ODE from time `first` to `last`, then the denoiser, as ``slope z + shift``.

    Along the ODE ``(x - alpha m) / sqrt(alpha^2 s^2 + sigma^2)`` does not change.
    """
    times = torch.tensor([first, last], dtype=torch.float64)
    (alpha_0, alpha), (sigma_0, sigma) = schedule.alpha_sigma(times)
    ratio = ((alpha**2 * STD**2 + sigma**2) / (alpha_0**2 * STD**2 + sigma_0**2)).sqrt()
    g = gain(alpha, sigma)
    return g * ratio * sigma_0, MEAN - g * ratio * alpha_0 * MEAN


@pytest.fixture(scope="session")
def gaussian():
    """What this file defines, for the tests beside it."""
    return SimpleNamespace(mean=MEAN, std=STD, Network=GaussianNetwork, chain=chain, exact=exact)
