"""Independent Gaussian values, of which the denoiser, its ODE and every affine student are known, in float64."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, NoiseSchedule, make_schedule, unpatchify
from maskdm_fast.diffusion.prediction import coefficients
from maskdm_fast.random import Stream

MEAN = torch.linspace(-0.6, 0.6, 16, dtype=torch.float64).view(4, 4)  # of each value of the tokens [N, P*P*C]
STD = torch.linspace(0.15, 0.6, 16, dtype=torch.float64).view(4, 4)
SHIFT = 0.4  # of the mean from one class to the next; no class is one of them, -1
SHAPE = {"image_size": 4, "channels": 1, "patch_size": 2}
NAMES = ("linear", "cosine", "vp", "flow", "edm")
ALL = [(name, prediction) for name in NAMES for prediction in make_schedule(name).predictions]
DRAW = {"seed": 3, "step": 8}

_TIME_OF_INPUT = {"vp": lambda t: t / 999, "flow": lambda t: t / 1000, "edm": lambda t: torch.exp(t / 100)}

X0 = Callable[..., Tensor]
"""``(tokens, t [B], alpha [B, 1, 1], sigma [B, 1, 1], labels, strength) -> x0``."""


def mean_of(labels: Tensor | None) -> Tensor:
    """``[N, P*P*C]``, or of each image."""
    return MEAN if labels is None else MEAN + SHIFT * labels[:, None, None]


def posterior_mean(tokens, t, alpha, sigma, labels, strength):
    """``E[x0 | xt] = m + alpha v (xt - alpha m) / (alpha^2 v + sigma^2)``, guided by w = `strength` if given."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)

    def estimate(mean: Tensor) -> Tensor:
        return mean + gain * (tokens - alpha * mean)

    if strength is None:
        return estimate(mean_of(labels))
    w = strength[:, None, None]
    return (1 + w) * estimate(mean_of(labels)) - w * estimate(mean_of(torch.full_like(labels, -1)))


@dataclasses.dataclass(frozen=True)
class ExactNetwork:
    """A network that says what it has to for x0 to be that of a function; it is called as `UViT` is."""

    name: str
    schedule: NoiseSchedule
    prediction: str
    x0: X0 = posterior_mean

    def __call__(self, tokens, t, ids_keep=None, labels=None, strength=None):
        assert ids_keep is None
        t = _TIME_OF_INPUT.get(self.name, lambda t: t)(t.double())
        alpha, sigma = (scale[:, None, None] for scale in self.schedule.alpha_sigma(t))
        x0 = self.x0(tokens.double(), t, alpha, sigma, labels, strength)
        eps_scale, x0_scale = coefficients(self.prediction, alpha, sigma)
        return eps_scale * (tokens.double() - alpha * x0) / sigma + x0_scale * x0


def exact_denoiser(name: str, prediction: str, schedule: NoiseSchedule | None = None, x0: X0 = posterior_mean):
    schedule = make_schedule(name) if schedule is None else schedule
    return Denoiser(ExactNetwork(name, schedule, prediction, x0), schedule, prediction)


def predictions_of_students(name: str) -> list[str]:
    return [prediction for prediction in make_schedule(name).predictions if prediction != "eps"]


def draw_images(num: int, labels: Tensor | None = None, seed: int = 7) -> Tensor:
    """float64 ``[num, 4, 4, 1]``."""
    slots = torch.arange(num)
    z = random.normal(16, seed=seed, stream=Stream.DATA_ORDER, step=0, slots=slots, dtype=torch.float64)
    return unpatchify(mean_of(labels) + STD * z.view(num, 4, 4), 2, 4, 4, 1).permute(0, 2, 3, 1)


class AffineStudent(nn.Module):
    """``slope xt + shift`` of each value, learned at each time of a list; of no other time it knows anything."""

    def __init__(self, times: Tensor):
        super().__init__()
        self.register_buffer("times", times)
        self.slope = nn.Parameter(torch.zeros(len(times), 4, 4, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(len(times), 4, 4, dtype=torch.float64))

    def forward(self, tokens: Tensor, t: Tensor, ids_keep: None = None, labels: None = None) -> Tensor:
        index = (t.double()[:, None] - self.times).abs().argmin(dim=1)
        return self.slope[index] * tokens.double() + self.shift[index]
