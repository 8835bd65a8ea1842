"""Score identity Distillation (SiD): a one- or few-step generator from a diffusion model, without data."""

import dataclasses

import torch
from torch import Tensor

from maskdm_fast import ops
from maskdm_fast.distill.fake_score import FakeBatch, FakeScore
from maskdm_fast.distill.levels import LevelDraw
from maskdm_fast.distill.networks import (
    GradientGate,
    GuidanceScales,
    Networks,
    add_noise,
    estimate,
    frozen,
    is_finite,
)

WEIGHTINGS = ("l1", "l1_xt", "karras", "none")


@dataclasses.dataclass(frozen=True)
class SiD:
    """Both updates of SiD. With the estimates of x0 at ``xt = alpha_t x_g + sigma_t eps`` and

        d = f_teacher - f_fake,    e = f_teacher - x_g

    the generator minimises ``scale w sum_values d (e - alpha d)``, whose gradient passes through x_g, and through xt
    into both networks; the weight w is a constant (`ops.sid_loss`). The fake network is trained on the generator's
    images (`FakeScore`).

    With a fake network that has converged, the gradient for alpha = 1/2 is half that of the Fisher divergence, the loss
    itself ``(1 - alpha)`` times the divergence: it is no sign of convergence, ``distance_per_image`` is. The fake
    network has to be updated first, because while it still equals the teacher the generator has no gradient at all.

    Args:
        alpha: 1.2 and 1.0 are the published ones, 0.5 to 1.2 the useful range.
        weighting: "l1" 1/mean|e|, the published one; "l1_xt" 1/mean|f_teacher - xt/alpha_t|; "karras" ``1/s^2 + 4``; or
            "none". The first is not a function of xt alone, which shifts the gradient by O(1/values of an image).
        scale: factor of the loss. Adam cancels it, but for its epsilon.
        levels: noise levels of the generator's update.
        fake_score: the fake network's update.
        guidance: scales of classifier-free guidance.

    Raises:
        ValueError: if there is no such weighting.

    Source: Zhou et al., "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models
    for One-Step Generation", ICML 2024, and its code; sums over values and constants are those of the code.
    """

    alpha: float = 1.2
    weighting: str = "l1"
    scale: float = 100.0
    levels: LevelDraw = dataclasses.field(default_factory=LevelDraw)
    fake_score: FakeScore = dataclasses.field(default_factory=FakeScore)
    guidance: GuidanceScales = dataclasses.field(default_factory=GuidanceScales)

    input_level = 2.5
    fake_updates = 1
    needs_images = False

    def __post_init__(self):
        check_weighting(self.weighting)

    def trains_generator(self, images_seen: int) -> bool:
        """Always."""
        return True

    def fake_loss(
        self,
        networks: Networks,
        labels: Tensor | None,
        images: Tensor | None = None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """See `Method`; `images` are not looked at."""
        draw = {"seed": seed, "step": step, "slots": slots}
        batch = FakeBatch.draw(networks, self.fake_score.levels, self.guidance.label_drop, labels, **draw)
        fake = estimate(networks.fake, batch.xt, batch.t, batch.labels, self.guidance.fake_training)
        loss = self.fake_score.loss(fake, batch.images, batch.alpha, batch.sigma, networks.fake.prediction)
        return {"loss": loss.mean(), "loss_per_image": loss.detach(), "t": batch.t}

    def generator_loss(
        self,
        networks: Networks,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
        images_seen: int = 0,
    ) -> dict[str, Tensor]:
        """See `Method`."""
        draw = {"seed": seed, "step": step, "slots": slots}
        view = GeneratorView.draw(networks, self.levels, labels, **draw)
        with frozen(networks.teacher.model, networks.fake.model):
            teacher = estimate(networks.teacher, view.xt, view.t, labels, self.guidance.teacher)
            fake = estimate(networks.fake, view.xt, view.t, labels, self.guidance.fake)
        return view.results(self.scale * view.loss(teacher, fake, self.weighting, self.alpha), teacher, fake)


@dataclasses.dataclass(frozen=True)
class GeneratorView:
    """Generated images and what the networks see of them, with autograd from `xt` to the generator.

    Attributes:
        images: ``[B, N, P*P*C]``.
        xt: likewise, noisy; an image that is not finite is noise alone.
        t: ``[B]``.
        alpha: ``[B]``.
        sigma: ``[B]``.
        gate: between `images` and `xt`.
    """

    images: Tensor
    xt: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    gate: GradientGate

    @classmethod
    def draw(
        cls,
        networks: Networks,
        levels: LevelDraw,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> "GeneratorView":
        """Generate images and noise them."""
        draw = {"seed": seed, "step": step, "slots": slots}
        images = networks.generator.for_training(labels, **draw)
        t = levels(networks.teacher.schedule, **draw)
        alpha, sigma = networks.teacher.schedule.alpha_sigma(t)
        gate = GradientGate(is_finite(images))
        return cls(images, add_noise(gate(images), alpha, sigma, **draw), t, alpha, sigma, gate)

    def loss(self, teacher: Tensor, fake: Tensor, weighting: str, alpha: float) -> Tensor:
        """``w sum_values d (e - alpha d)`` per image, ``[B]``, from the two estimates; closes the gate to images with a
        value that is no number."""
        self.gate.keep_only(teacher, fake)
        mean = ops.sid_loss(
            self.images,
            teacher,
            fake,
            alpha=alpha,
            weighting=weighting,
            xt=self.xt,
            alpha_t=self.alpha,
            sigma_t=self.sigma,
            reduction="none",
        )
        return mean * self.images.shape[1:].numel()

    def results(self, loss: Tensor, teacher: Tensor, fake: Tensor, **more: Tensor) -> dict[str, Tensor]:
        """What `Method.generator_loss` returns, from the loss per image."""
        distance = (teacher.detach() - fake.detach()).square().flatten(1).mean(1)
        keep = self.gate.keep
        return {
            "loss": loss.mean(),
            "loss_per_image": loss.detach(),
            "distance_per_image": torch.where(keep, distance, 0.0),
            "t": self.t,
            "finite_share": keep.to(torch.float32).mean(),
            **more,
        }


def check_weighting(weighting: str) -> str:
    """Return `weighting`, or raise ValueError unless it is one of `WEIGHTINGS`."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}, want one of {', '.join(WEIGHTINGS)}")
    return weighting
