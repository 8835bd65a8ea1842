"""Samplers: DDIM and DDPM-ancestral, on the tokens of all patches.

Both walk down a sub-sequence of times t -> s with one linear rule,

    x_s = c_x0 x0 + c_xt x_t + std z,    x0 = denoiser(x_t, t), clipped to [-1, 1] if asked,    z ~ N(0, I)

whose coefficients are worked out on the host in float64, from roots of sums that no rounding turns negative. The
direction is thereby the noise that belongs to the x0 in use: after clipping, eps = (x_t - alpha x0) / sigma follows the
clipped x0, where the code published with MaskDM keeps the network's own.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.diffusion.denoiser import Denoiser
from maskdm_fast.diffusion.patches import unpatchify
from maskdm_fast.diffusion.schedule import NoiseSchedule
from maskdm_fast.random import Stream

SAMPLERS = ("ddim", "ddpm")


@dataclasses.dataclass(frozen=True)
class Transition:
    """One step of a sampler: ``x_s = c_x0 x0 + c_xt x_t + std z`` from time `t`."""

    t: int
    c_x0: float
    c_xt: float
    std: float


def sampling_times(num_timesteps: int, num_steps: int) -> list[int]:
    """The times that a sampler visits: ``floor(-1 + i T / num_steps)`` for i = num_steps..0; -1 means no noise is left.

    Computed in integers; with ``num_steps == num_timesteps`` every time is visited once.

    Raises:
        ValueError: unless ``1 <= num_steps <= num_timesteps``.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps is {num_steps}, want 1 to {num_timesteps}, the time steps of the noise schedule")
    return [i * num_timesteps // num_steps - 1 for i in range(num_steps, -1, -1)]


def ddim_transitions(schedule: NoiseSchedule, num_steps: int, eta: float) -> list[Transition]:
    """The steps of DDIM; with ``a = alpha_bar_t, b = alpha_bar_s``,

        std = eta sqrt((1 - a/b) (1 - b) / (1 - a))
        c   = sqrt(1 - b - std^2) = sqrt((1 - b) (1 - eta^2 + eta^2 (a/b) (1 - b) / (1 - a)))
        x_s = sqrt(b) x0 + c eps + std z,    eps = (x_t - sqrt(a) x0) / sqrt(1 - a)

    The second form of c is a sum of terms that are not negative: no rounding makes its root a NaN.

    Args:
        schedule: the schedule of the denoiser.
        num_steps: evaluations of the network, 1..T.
        eta: 0 (deterministic) to 1 (as much noise as DDPM).

    Raises:
        ValueError: if `num_steps` or `eta` is out of range.

    Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}, want 0 (deterministic) to 1")
    transitions = []
    for t, a, b in _time_pairs(schedule, num_steps):
        c = math.sqrt((1 - b) * (1 - eta**2 + eta**2 * (a / b) * (1 - b) / (1 - a)))
        std = eta * math.sqrt((1 - a / b) * (1 - b) / (1 - a))
        c_xt = c / math.sqrt(1 - a)
        transitions.append(Transition(t, math.sqrt(b) - c_xt * math.sqrt(a), c_xt, std))
    return transitions


def ddpm_transitions(schedule: NoiseSchedule, num_steps: int) -> list[Transition]:
    """The steps of ancestral sampling from the posterior ``q(x_s | x_t, x0)``; with a, b as in `ddim_transitions`,

        c_x0 = sqrt(b) (1 - a/b) / (1 - a)
        c_xt = sqrt(a/b) (1 - b) / (1 - a)
        std  = sqrt((1 - a/b) (1 - b) / (1 - a))

    Args:
        schedule: the schedule of the denoiser.
        num_steps: evaluations of the network, 1..T.

    Raises:
        ValueError: if `num_steps` is out of range.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 6 and 7.
    """
    return [
        Transition(
            t,
            math.sqrt(b) * (1 - a / b) / (1 - a),
            math.sqrt(a / b) * (1 - b) / (1 - a),
            math.sqrt((1 - a / b) * (1 - b) / (1 - a)),
        )
        for t, a, b in _time_pairs(schedule, num_steps)
    ]


def sample(
    denoiser: Denoiser,
    *,
    num_images: int,
    image_size: int,
    channels: int,
    patch_size: int,
    sampler: str = "ddim",
    num_steps: int,
    eta: float | None = None,
    seed: int,
    first_slot: int = 0,
    labels: Tensor | None = None,
    clip: bool = True,
    batch_size: int,
    as_float: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate images.

    Image i depends on (seed, first_slot + i) and its label alone: its noise is bit-identical whatever the batch size.
    Networks run in eval mode, which is undone afterwards, and without autograd; autocast is the caller's.

    Args:
        denoiser: network and schedule; the images are made on its device.
        num_images: how many.
        image_size: side in pixels.
        channels: C.
        patch_size: side P of the patches of the network.
        sampler: "ddim" or "ddpm".
        num_steps: evaluations of the network per image, 1..T.
        eta: of "ddim", 0 (deterministic, the default) to 1; must be None for "ddpm".
        seed: of the noise; ``x_T`` comes from `Stream.GENERATOR_NOISE`, the noise of step i from
            `Stream.SAMPLER_NOISE`.
        first_slot: slot of the first image; later calls go on with ``first_slot + num_images``.
        labels: int64 ``[num_images]``, or None.
        clip: clip every estimate of x0 to [-1, 1].
        batch_size: images per evaluation of the network.
        as_float: return float32 in about [-1, 1] instead of uint8.
        progress: called as ``progress(done, total)`` after every evaluation of the network.

    Returns:
        On the CPU, ``[num_images, image_size, image_size, C]``: uint8 ``round((x + 1) * 127.5)``, or float32.

    Raises:
        ValueError: if an argument is out of range or does not fit another.
    """
    sizes = {"num_images": num_images, "batch_size": batch_size, "patch_size": patch_size, "channels": channels}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"sample: {name} is {value}, want at least 1")
    if first_slot < 0:
        raise ValueError(f"sample: first_slot is {first_slot}, want 0 or more")
    if image_size < 1 or image_size % patch_size:
        raise ValueError(f"sample: image_size is {image_size}, want a multiple of patch_size {patch_size}")
    if labels is not None and labels.shape != (num_images,):
        raise ValueError(f"sample: labels has shape {list(labels.shape)}, want [{num_images}], one per image")
    transitions = _transitions(denoiser.schedule, sampler, num_steps, eta)

    token_shape = ((image_size // patch_size) ** 2, patch_size**2 * channels)
    images = torch.empty(num_images, image_size, image_size, channels, dtype=torch.float32 if as_float else torch.uint8)
    total = -(-num_images // batch_size) * num_steps
    with _eval_mode(denoiser.model), torch.inference_mode():
        for batch, start in enumerate(range(0, num_images, batch_size)):
            end = min(start + batch_size, num_images)
            slots = torch.arange(first_slot + start, first_slot + end, device=denoiser.device)
            x = _noise(token_shape, seed=seed, stream=Stream.GENERATOR_NOISE, step=0, slots=slots)
            batch_labels = None if labels is None else labels[start:end].to(denoiser.device)
            for index, transition in enumerate(transitions):
                x0 = denoiser(x, torch.full_like(slots, transition.t), batch_labels)
                if clip:
                    x0 = x0.clamp(-1.0, 1.0)
                x = transition.c_x0 * x0 + transition.c_xt * x
                if transition.std:
                    noise = _noise(token_shape, seed=seed, stream=Stream.SAMPLER_NOISE, step=index, slots=slots)
                    x = x + transition.std * noise
                if progress is not None:
                    progress(batch * num_steps + index + 1, total)
            pixels = unpatchify(x, patch_size, image_size, image_size, channels).permute(0, 2, 3, 1)
            images[start:end] = pixels if as_float else ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images


def _transitions(schedule: NoiseSchedule, sampler: str, num_steps: int, eta: float | None) -> list[Transition]:
    if sampler not in SAMPLERS:
        raise ValueError(f"sample: unknown sampler {sampler!r}, want one of {', '.join(SAMPLERS)}")
    if sampler == "ddim":
        return ddim_transitions(schedule, num_steps, 0.0 if eta is None else eta)
    if eta is not None:
        raise ValueError(f"sample: eta is {eta}, but sampler 'ddpm' has none; leave it None or choose 'ddim'")
    return ddpm_transitions(schedule, num_steps)


def _time_pairs(schedule: NoiseSchedule, num_steps: int) -> Iterator[tuple[int, float, float]]:
    """``(t, alpha_bar_t, alpha_bar_s)`` of each step t -> s; nothing but signal is left at s = -1."""
    alpha_bar = [*schedule.alpha_bar.tolist(), 1.0]
    times = sampling_times(schedule.num_timesteps, num_steps)
    for t, s in itertools.pairwise(times):
        yield t, alpha_bar[t], alpha_bar[s]


def _noise(token_shape: tuple[int, int], *, seed: int, stream: Stream, step: int, slots: Tensor) -> Tensor:
    """Standard normal tokens ``[B, N, P*P*C]``, float32."""
    draws = random.normal(math.prod(token_shape), seed=seed, stream=stream, step=step, slots=slots)
    return draws.unflatten(1, token_shape)


@contextlib.contextmanager
def _eval_mode(model: Callable) -> Iterator[None]:
    """Put every module of `model` into eval mode, and each back into its own afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
