"""The three networks of score distillation, and how each is asked."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, Guidance
from maskdm_fast.distill.generator import Generator
from maskdm_fast.random import Stream

GUIDANCE_MODES = ("none", "teacher", "lsg", "zero")


@dataclasses.dataclass(frozen=True)
class Networks:
    """Teacher, fake and generator.

    Args:
        teacher: the diffusion model that is distilled; never trained.
        fake: the same for the generator's images, on which it is trained while the generator changes; it starts as a
            copy of the teacher.
        generator: the student, which starts as a copy of the teacher too.

    Raises:
        ValueError: if teacher and fake disagree about the noise at some time.
    """

    teacher: Denoiser
    fake: Denoiser
    generator: Generator

    def __post_init__(self):
        first, second = self.teacher.schedule, self.fake.schedule
        if (type(first), first.num_timesteps, first.noise_range) != (
            type(second),
            second.num_timesteps,
            second.noise_range,
        ):
            raise ValueError("teacher and fake have different noise schedules, but see the same noisy images")


@dataclasses.dataclass(frozen=True)
class GuidanceScales:
    """Scales of the classifier-free guidance of each network, 1 meaning none.

    Args:
        teacher: of the teacher's estimate.
        fake: of the fake network's estimate in the generator's update.
        fake_training: of the fake network's estimate in its own update: it is then trained such that its guided
            estimate fits the generator's images.
        label_drop: probability, 0..1, that a label is dropped in the fake network's update.

    A scale of 0 asks without labels, for the price of one call.

    Raises:
        ValueError: if `label_drop` is no probability.

    Source: Zhou et al., "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image Generation",
    ICLR 2025, and its code.
    """

    teacher: float = 1.0
    fake: float = 1.0
    fake_training: float = 1.0
    label_drop: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.label_drop <= 1.0:
            raise ValueError(f"label_drop is {self.label_drop}, want a probability in [0, 1]")

    @classmethod
    def of_mode(cls, mode: str, scale: float = 1.0) -> "GuidanceScales":
        """The scales of a published mode.

            none:     no guidance
            teacher:  the teacher's estimate alone is guided, by `scale` ("long"; also DMD2)
            lsg:      long and short: all are guided by `scale`, and the fake network drops 1 label in 10
            zero:     the fake network is unconditional, the teacher conditional

        Raises:
            ValueError: if there is no such mode, or none and zero come with a scale.

        Source: as above; zero: Zhou et al., "Few-Step Diffusion via Score identity Distillation", arXiv 2505.12674.
        """
        if mode not in GUIDANCE_MODES:
            raise ValueError(f"unknown guidance mode {mode!r}, want one of {', '.join(GUIDANCE_MODES)}")
        if mode in ("none", "zero") and scale != 1.0:
            raise ValueError(f"guidance mode {mode!r} has no scale, but {scale} was given; want teacher or lsg")
        if mode == "lsg":
            return cls(teacher=scale, fake=scale, fake_training=scale, label_drop=0.1)
        return cls(teacher=scale) if mode in ("none", "teacher") else cls(fake=0.0, fake_training=0.0)


def estimate(denoiser: Denoiser, xt: Tensor, t: Tensor, labels: Tensor | None, scale: float = 1.0) -> Tensor:
    """The estimate of x0, guided by `scale`; ``[B, N, P*P*C]``."""
    if scale == 0.0:
        return denoiser(xt, t, seen_labels(labels, scale))
    return denoiser(xt, t, labels, Guidance(scale))


def seen_labels(labels: Tensor | None, scale: float) -> Tensor | None:
    """The labels that a network is asked with for guidance by `scale`: at 0 they are -1, which stands for none."""
    return torch.full_like(labels, -1) if labels is not None and scale == 0.0 else labels


def drop_labels(
    labels: Tensor | None, probability: float, *, seed: int, step: int | Tensor, slots: Tensor
) -> Tensor | None:
    """`labels`, each -1 with `probability`."""
    if labels is None or probability == 0.0:
        return labels
    u = random.uniform(1, seed=seed, stream=Stream.LABEL_DROP, step=step, slots=slots)[:, 0]
    return labels.masked_fill(u < probability, -1)


def add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
    """``alpha x0 + sigma eps`` with eps from `Stream.NOISE`; the gradient goes to `x0`.

    Args:
        x0: ``[B, N, P*P*C]``.
        alpha: ``[B]``.
        sigma: ``[B]``.
        seed: run seed.
        step: number of the update.
        slots: int64 ``[B]``, places in the global batch.
    """
    shape = x0.shape[1:]
    eps = random.normal(math.prod(shape), seed=seed, stream=Stream.NOISE, step=step, slots=slots, dtype=x0.dtype)
    alpha, sigma = (scale.to(x0.dtype)[:, None, None] for scale in (alpha, sigma))
    return torch.addcmul(sigma * eps.unflatten(1, shape), alpha, x0)


@contextlib.contextmanager
def frozen(*models: Callable) -> Iterator[None]:
    """In this context the parameters of `models` ask for no gradient.

    What is computed in it hands gradients on to its inputs, but weight gradients are neither computed nor stored, even
    if the backward pass comes later; nor are the inputs of the linear layers kept, which only those need.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    asking = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def is_finite(*images: Tensor) -> Tensor:
    """bool ``[B]``: whether all values of an image are numbers, in each of these ``[B, ...]``."""
    return torch.stack([image.detach().isfinite().flatten(1).all(1) for image in images]).all(0)


def only(images: Tensor, keep: Tensor) -> Tensor:
    """`images` ``[B, ...]``, with zeros for those that are not to be kept; their gradient is zero too."""
    return torch.where(keep.reshape(-1, *(1,) * (images.ndim - 1)), images, 0.0)


class GradientGate:
    """Lets the gradient of an image pass or makes it zero, as is decided between the forward and the backward pass.

    A network that overflowed on an image answers a gradient of zero with NaN, since its derivative is no number. The
    gate stands before the network, so that this NaN does not reach what made the image.

    Args:
        keep: bool ``[B]``, which images pass at all: the others leave as zeros.

    Attributes:
        keep: bool ``[B]``, whose gradients pass.
    """

    def __init__(self, keep: Tensor):
        self.keep = keep

    def __call__(self, images: Tensor) -> Tensor:
        """`images` ``[B, N, P*P*C]``, with the gate behind them."""
        gated = only(images, self.keep)
        if gated.requires_grad:
            gated.register_hook(lambda grad: only(grad, self.keep))
        return gated

    def keep_only(self, *images: Tensor) -> None:
        """Close the gate to the images of which one of these ``[B, ...]`` has a value that is no number."""
        self.keep = self.keep & is_finite(*images)


def clean_gradients(parameters: Iterable[nn.Parameter], limit: float = 1e5, clip: float | None = None) -> None:
    """In place: a gradient that is no number becomes 0, an infinite one `limit`; then each is cut to `clip`.

    One image in which the trained network overflowed makes NaN of the gradients of nearly all weights, so that the
    update of its batch is lost, and the weights are not.

    Source: the code of Zhou et al., "Score identity Distillation", ICML 2024, before every step; that of "Adversarial
    Score identity Distillation", ICLR 2025, also cuts to 1.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            torch.nan_to_num(parameter.grad, nan=0.0, posinf=limit, neginf=-limit, out=parameter.grad)
            if clip is not None:
                parameter.grad.clamp_(-clip, clip)
