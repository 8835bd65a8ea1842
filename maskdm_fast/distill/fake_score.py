"""The fake network's update: denoising score matching on the generator's images."""

import dataclasses

import torch
from torch import Tensor

from maskdm_fast.diffusion import LossWeight
from maskdm_fast.diffusion.prediction import x0_coefficients
from maskdm_fast.distill.levels import LevelDraw
from maskdm_fast.distill.networks import Networks, add_noise, drop_labels, is_finite, only


@dataclasses.dataclass(frozen=True)
class FakeScore:
    """How the fake network is trained.

        loss = scale reduction(w(t) (f_fake(xt, t) - x_g)^2),    xt = alpha x_g + sigma eps

    Args:
        levels: at which noise levels.
        weight: of the squared error, said of the network's output as in training; "edm" and "none" are the recipes of
            EDM and of eps-prediction teachers.
        scale: factor of the loss.
        reduction: over the values of an image, sum or mean.

    Raises:
        ValueError: if the reduction is neither.

    Source: Zhou et al., "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models
    for One-Step Generation", ICML 2024, equation 21.
    """

    levels: LevelDraw = dataclasses.field(default_factory=lambda: LevelDraw("lognormal", greatest=80.0))
    weight: LossWeight = dataclasses.field(default_factory=lambda: LossWeight("edm"))
    scale: float = 1.0
    reduction: str = "sum"

    def __post_init__(self):
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is {self.reduction!r}, want 'sum' or 'mean'")

    def of_x0(self, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
        """The weight on the squared error of x0, float64 ``[B]``, for a network with this `prediction`."""
        alpha, sigma = alpha.to(torch.float64), sigma.to(torch.float64)
        per_output = self.weight(alpha, sigma, prediction)
        inverse = x0_coefficients(prediction, alpha, sigma)[1].square().reciprocal()
        return inverse if per_output is None else per_output * inverse

    def loss(self, estimate: Tensor, target: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
        """The loss per image, 0 without gradient for one with a value that is no number.

        Args:
            estimate: ``[B, N, P*P*C]``, of x0.
            target: likewise, the generator's images.
            alpha: ``[B]``.
            sigma: ``[B]``.
            prediction: what the network predicts.

        Returns:
            ``[B]``, float32, or float64 for such images.
        """
        keep = is_finite(estimate, target)
        error = (only(estimate, keep) - only(target, keep)).square().flatten(1)
        error = error.sum(1) if self.reduction == "sum" else error.mean(1)
        return (self.scale * self.of_x0(alpha, sigma, prediction)).to(error.dtype) * error


@dataclasses.dataclass(frozen=True)
class FakeBatch:
    """What the fake network is trained on: generated images, clean and noisy. Made without autograd."""

    images: Tensor
    xt: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    labels: Tensor | None

    @classmethod
    def draw(
        cls,
        networks: Networks,
        levels: LevelDraw,
        label_drop: float,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> "FakeBatch":
        """Generate images and noise them; an image that is not finite goes on as it is, and its copy in `xt` as 0."""
        draw = {"seed": seed, "step": step, "slots": slots}
        with torch.no_grad():
            images = networks.generator.for_training(labels, **draw)
            t = levels(networks.fake.schedule, **draw)
            alpha, sigma = networks.fake.schedule.alpha_sigma(t)
            xt = add_noise(only(images, is_finite(images)), alpha, sigma, **draw)
        return cls(images, xt, t, alpha, sigma, drop_labels(labels, label_drop, **draw))
