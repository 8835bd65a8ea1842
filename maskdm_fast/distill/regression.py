"""Distillation by regression: a student learns targets that are made without gradients.

    L = E w(t) |x0_student(xt, t) - sg[target]|^2,    xt = alpha x0 + sigma eps

What the methods have in common is here; `guided`, `progressive` and `consistency` differ in how they make the target.
They see networks as estimates of x0 at levels (alpha, sigma), so every schedule and prediction goes through the same
lines. Teacher and student share one schedule, and see whole images.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from maskdm_fast import ops, random
from maskdm_fast.diffusion import Denoiser, EDMSchedule, Guidance, NoiseSchedule
from maskdm_fast.diffusion.denoiser import UNGUIDED
from maskdm_fast.random import Stream

X0_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "truncated-snr": lambda snr: snr.clamp(min=1.0),
    "snr-plus-one": lambda snr: snr + 1.0,
    "edm": lambda snr: snr + EDMSchedule.sigma_data**-2,
}
"""Weights of the squared error of x0, of ``snr = alpha^2 / sigma^2``: truncated-snr is the greater of the errors of x0
and of eps, snr-plus-one that of v, edm that of the preconditioned network. Salimans and Ho (arXiv 2202.00512), section
4; Karras et al. (arXiv 2206.00364), table 1."""


@dataclasses.dataclass(frozen=True)
class Instant:
    """A time of each image with its scales, all float64 ``[B]``; a clean image has alpha 1 and sigma 0."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def at(cls, schedule: NoiseSchedule, t: Tensor) -> "Instant":
        """The instants of the times `t`, ``[B]``."""
        t = t.to(torch.float64)
        return cls(t, *schedule.alpha_sigma(t))

    def cleaned(self, clean: Tensor) -> "Instant":
        """The clean image where `clean`, bool ``[B]``, is True; the times stay, for networks are still asked there."""
        return Instant(self.t, self.alpha.masked_fill(clean, 1.0), self.sigma.masked_fill(clean, 0.0))

    @property
    def noise(self) -> Tensor:
        """``sigma / alpha``, infinite where alpha is 0."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Tensor:
        """``alpha^2 / sigma^2``."""
        return (self.alpha / self.sigma).square()


def expand(scale: Tensor, like: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, 1]`` in the dtype of the tokens `like`."""
    return scale.to(like.dtype)[:, None, None]


def ddim_step(xt: Tensor, x0: Tensor, here: Instant, there: Instant) -> Tensor:
    """The step of DDIM without noise, which keeps x0 and the noise that belongs to it.

        x_s = alpha_s x0 + sigma_s eps,    eps = (xt - alpha_t x0) / sigma_t

    Args:
        xt: ``[B, N, P*P*C]``, at `here`.
        x0: likewise, the clean image that is believed in. With the true one, x_s has the noise of xt.
        here: t.
        there: s; x0 itself where it is clean.

    Returns:
        Of the shape and dtype of `xt`.

    Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equation 12.
    """
    c_xt = there.sigma / here.sigma
    return torch.addcmul(expand(c_xt, xt) * xt, expand(there.alpha - c_xt * here.alpha, xt), x0)


def tell(denoiser: Denoiser, strength: Tensor | None) -> Denoiser:
    """The denoiser whose network is told its guidance weights, ``[B]``, as `strength`; unchanged for None."""
    if strength is None:
        return denoiser
    return dataclasses.replace(denoiser, model=functools.partial(denoiser.model, strength=strength))


def guided_x0(denoiser: Denoiser, xt: Tensor, t: Tensor, labels: Tensor, strength: Tensor) -> Tensor:
    """Classifier-free guidance with a weight of each image: ``(1 + w) x0(label) - w x0(none)``.

    Args:
        denoiser: of a network that knows classes; evaluated once, on twice as many images.
        xt: ``[B, N, P*P*C]``.
        t: ``[B]``.
        labels: int64 ``[B]``.
        strength: w, ``[B]``; 0 follows the labels as trained. In `Guidance` the same is the scale ``1 + w``.

    Returns:
        Of the shape and dtype of `xt`.

    Source: Meng et al., "On Distillation of Guided Diffusion Models", CVPR 2023 (arXiv 2210.03142), section 2.
    """
    both = torch.cat((labels, torch.full_like(labels, -1)))
    with_label, without = denoiser(xt.repeat(2, 1, 1), t.repeat(2), both).chunk(2)
    return torch.lerp(without, with_label, expand(1.0 + strength, xt))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """What every method is configured with.

    With `strengths`, each image draws a weight w of guidance uniformly from that range; student and, if `told_teacher`,
    teacher are given it with every call, the teacher otherwise is guided by it.

    Args:
        patch_size: side P of the patches of the networks.
        layout: "bhwc" or "bchw", the order of the images' axes.
        hflip: probability, 0..1, that an image is mirrored.
        weight: of the squared error of x0, by noise level: a name from `weights`.
        clip: clip the estimates of the teacher to [-clip, clip]; None: do not.
        guidance: of the teacher, for a student that is not told a weight.
        strengths: least and greatest weight w, 0 meaning no more than the label; None: the student is told none.
        told_teacher: the teacher was distilled to take w, rather than being one to guide.

    Raises:
        ValueError: if a value is not one of those above.
    """

    weights: ClassVar[tuple[str, ...]] = tuple(X0_WEIGHTS)

    patch_size: int
    layout: str = "bhwc"
    hflip: float = 0.0
    weight: str = "truncated-snr"
    clip: float | None = None
    guidance: Guidance = UNGUIDED
    strengths: tuple[float, float] | None = None
    told_teacher: bool = False

    def __post_init__(self):
        name = type(self).__name__
        if self.patch_size < 1:
            raise ValueError(f"{name}: patch_size is {self.patch_size}, want at least 1")
        if self.layout not in ("bhwc", "bchw"):
            raise ValueError(f"{name}: layout is {self.layout!r}, want 'bhwc' or 'bchw'")
        if not 0.0 <= self.hflip <= 1.0:
            raise ValueError(f"{name}: hflip is {self.hflip}, want a probability in [0, 1]")
        if self.weight not in self.weights:
            raise ValueError(f"{name}: unknown weight {self.weight!r}, want one of {', '.join(self.weights)}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"{name}: clip is {self.clip}, want the bound of the images, or None")
        if self.strengths is None:
            if self.told_teacher:
                raise ValueError(f"{name}: told_teacher is set, want the strengths that it is told")
        elif not self.strengths[0] <= self.strengths[1]:
            raise ValueError(f"{name}: strengths is {self.strengths}, want (least, greatest)")
        elif self.guidance != UNGUIDED:
            raise ValueError(f"{name}: strengths and guidance are both given; each weight is drawn from strengths")

    def noisy(
        self, images: Tensor, here: Instant, *, seed: int, step: int | Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(xt, x0)`` of images, ``[B, N, P*P*C]``: float64 for images in float64, else float32."""
        flip = None
        if self.hflip:
            flip = random.uniform(1, seed=seed, stream=Stream.FLIP, step=step, slots=slots)[:, 0] < self.hflip
        return ops.noise_visible_patches(
            images,
            None,
            here.alpha,
            here.sigma,
            patch_size=self.patch_size,
            prediction="x0",
            seed=seed,
            step=step,
            slots=slots,
            flip=flip,
            out_dtype=torch.float64 if images.dtype == torch.float64 else torch.float32,
            layout=self.layout,
        )

    def strength(self, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor | None:
        """The weights w of a batch, float64 ``[B]``, from `Stream.GUIDANCE`; None without `strengths`."""
        if self.strengths is None:
            return None
        least, greatest = self.strengths
        u = random.uniform(1, seed=seed, stream=Stream.GUIDANCE, step=step, slots=slots)[:, 0]
        return least + (greatest - least) * u.to(torch.float64)

    def estimate(
        self, teacher: Denoiser, xt: Tensor, here: Instant, labels: Tensor | None, strength: Tensor | None
    ) -> Tensor:
        """The x0 of the teacher, guided and clipped as configured.

        Raises:
            ValueError: if there is guidance but no labels.
        """
        if strength is None:
            x0 = teacher(xt, here.t, labels, self.guidance)
        elif labels is None:
            raise ValueError(
                f"{type(self).__name__}: strengths need labels, and a teacher that was trained with classes"
            )
        elif self.told_teacher:
            x0 = tell(teacher, strength)(xt, here.t, labels)
        else:
            x0 = guided_x0(teacher, xt, here.t, labels, strength)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def fit(
        self,
        student: Denoiser,
        target: Tensor,
        xt: Tensor,
        here: Instant,
        labels: Tensor | None,
        strength: Tensor | None,
        weight: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of a student at its targets.

        Args:
            student: its network gets the gradient.
            target: ``[B, N, P*P*C]``, without gradient.
            xt: what the student sees, likewise.
            here: when.
            labels: int64 ``[B]``, or None.
            strength: w, ``[B]``, or None.
            weight: of each image, ``[B]``.

        Returns:
            ``loss``, a scalar with gradient, the mean of ``loss_per_image [B]`` (detached), which is ``weight`` times
            ``distance_per_image [B]``, and the times ``t [B]``.
        """
        distance = self.distance(tell(student, strength)(xt, here.t, labels), target)
        loss = distance * weight.to(distance.dtype)
        return {
            "loss": loss.mean(),
            "loss_per_image": loss.detach(),
            "distance_per_image": distance.detach(),
            "t": here.t,
        }

    def distance(self, x0: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each image, ``[B]``."""
        return ops.masked_dsm_loss(x0, target, reduction="none")


def check_schedules(student: Denoiser, teacher: Denoiser) -> None:
    """Raise ValueError unless the two share one schedule: their times and states have to mean the same."""
    if student.schedule is not teacher.schedule:
        raise ValueError("student and teacher have schedules of their own; build both denoisers with the same object")
