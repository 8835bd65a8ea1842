"""Sampling: from noise to images, on the tokens of all patches.

Every sampler is a list of linear steps (`transitions`). The x0 that a step uses is the clipped one, and its direction
is the noise that belongs to it: eps = (x_t - alpha x0) / sigma follows the clipped x0, where the code published with
MaskDM keeps the network's own.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.diffusion.denoiser import Denoiser, Guidance
from maskdm_fast.diffusion.patches import unpatchify
from maskdm_fast.diffusion.transitions import Transition, make_transitions
from maskdm_fast.random import Stream


def sample(
    denoiser: Denoiser,
    *,
    num_images: int,
    image_size: int,
    channels: int,
    patch_size: int,
    sampler: str = "ddim",
    num_steps: int | None = None,
    eta: float | None = None,
    transitions: Sequence[Transition] | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    seed: int,
    first_slot: int = 0,
    labels: Tensor | None = None,
    clip: bool = True,
    bound: float = 1.0,
    batch_size: int,
    as_float: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate images.

    Image i depends on (seed, first_slot + i) and its label alone: its noise is bit-identical whatever the batch size.
    Networks run in eval mode, which is undone afterwards, and without autograd; autocast is the caller's. What does not
    depend on the image (coefficients, time tokens) is worked out once, before the first step.

    Args:
        denoiser: network and schedule; the images are made on its device.
        num_images: how many.
        image_size: side in pixels.
        channels: C.
        patch_size: side P of the patches of the network.
        sampler: "ddim", "ddpm", "euler", "heun" or "dpmpp_2m", as in `make_transitions`.
        num_steps: steps. One evaluation of the network each; two for heun, but for its last.
        eta: of "ddim", 0 (deterministic, the default) to 1; must be None for the others.
        transitions: the steps themselves, first to last, for a distilled model with steps of its own; then `num_steps`
            and `eta` must be None, and `sampler` is not looked at.
        guidance: scale w of ``x0 = x0(none) + w (x0(label) - x0(none))``, at least 0; 1 follows the labels as trained.
            Any other evaluates the network on twice as many images.
        guidance_interval: noise levels ``sigma/alpha``, lowest and highest, at which to guide; None: at all.
        seed: of the noise; the first comes from `Stream.GENERATOR_NOISE`, that of step i from `Stream.SAMPLER_NOISE`.
        first_slot: slot of the first image; later calls go on with ``first_slot + num_images``.
        labels: int64 ``[num_images]``, or None.
        clip: clip every estimate of x0 to [-bound, bound].
        bound: largest absolute value of x0: 1 for images; latents have another.
        batch_size: images per evaluation of the network.
        as_float: return float32 in about [-bound, bound] instead of uint8, which has room for [-1, 1].
        progress: called as ``progress(done, total)`` after every evaluation of the network on a batch.

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
    if transitions is None:
        if num_steps is None:
            raise ValueError("sample: num_steps is None, want the steps of the sampler, or transitions in its place")
        transitions = make_transitions(denoiser.schedule, sampler, num_steps, eta)
    elif num_steps is not None or eta is not None or not transitions:
        raise ValueError("sample: transitions want at least one step, and num_steps and eta left at None")

    token_shape = ((image_size // patch_size) ** 2, patch_size**2 * channels)
    images = torch.empty(num_images, image_size, image_size, channels, dtype=torch.float32 if as_float else torch.uint8)
    total = -(-num_images // batch_size) * len(transitions)
    with eval_mode(denoiser.model), torch.inference_mode():
        times = [transition.t for transition in transitions]
        levels = denoiser.levels(times, Guidance(guidance, guidance_interval))
        # The noise of the first level; that of the image is too small there to matter.
        scale = denoiser.schedule.alpha_sigma(torch.tensor(times[0], dtype=torch.float64))[1].item()
        for batch, start in enumerate(range(0, num_images, batch_size)):
            end = min(start + batch_size, num_images)
            slots = torch.arange(first_slot + start, first_slot + end, device=denoiser.device)
            x = _noise(token_shape, seed=seed, stream=Stream.GENERATOR_NOISE, step=0, slots=slots).mul_(scale)
            batch_labels = None if labels is None else labels[start:end].to(denoiser.device)
            last = x0 = None
            for index, (transition, level) in enumerate(zip(transitions, levels, strict=True)):
                last, x0 = x0, denoiser.at(level, x, batch_labels)
                if clip:
                    x0.clamp_(-bound, bound)
                # A new tensor, since the network may have kept the old one.
                x = torch.mul(x, transition.c_xt).add_(x0, alpha=transition.c_x0)
                if transition.c_last:
                    x.add_(last, alpha=transition.c_last)
                if transition.std:
                    noise = _noise(token_shape, seed=seed, stream=Stream.SAMPLER_NOISE, step=index, slots=slots)
                    x.add_(noise, alpha=transition.std)
                if progress is not None:
                    progress(batch * len(transitions) + index + 1, total)
            pixels = unpatchify(x, patch_size, image_size, image_size, channels).permute(0, 2, 3, 1)
            images[start:end] = pixels if as_float else ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images


def _noise(token_shape: tuple[int, int], *, seed: int, stream: Stream, step: int, slots: Tensor) -> Tensor:
    """Standard normal tokens ``[B, N, P*P*C]``, float32."""
    draws = random.normal(math.prod(token_shape), seed=seed, stream=stream, step=step, slots=slots)
    return draws.unflatten(1, token_shape)


@contextlib.contextmanager
def eval_mode(model: Callable) -> Iterator[None]:
    """Put every module of `model` into eval mode, and each back into its own afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
