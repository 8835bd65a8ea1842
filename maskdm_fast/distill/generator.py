"""The student: a denoiser asked at one or a few fixed noise levels."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, unpatchify
from maskdm_fast.diffusion.samplers import eval_mode
from maskdm_fast.distill.levels import time_of_level
from maskdm_fast.random import Stream

TRAINED_STEPS = ("all", "one")


class MakesImages(Protocol):
    """What `generate` asks: called as ``student(labels, seed=, step=, slots=)`` it makes tokens ``[B, N, P*P*C]``.

    Attributes:
        denoiser: its network.
        token_shape: ``(N, P*P*C)``.
    """

    denoiser: Denoiser
    token_shape: tuple[int, int]

    def __call__(self, labels: Tensor | None, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Generator:
    """Noise to images in K calls of a denoiser, the k-th at the noise level ``s_k``:

        x_1 = f(sigma_1 z, t_1),    x_{k+1} = f(alpha_{k+1} x_k + sigma_{k+1} eps_k, t_{k+1})

    with z and eps standard normal and t_k the time at which ``sigma/alpha = s_k``. The first input holds no image at
    all, so that a generator which starts as a copy of its teacher is the teacher's estimate at s_1.

    Of several steps, training sees the last image with all calls in the graph (``all``), or that of one step k, drawn
    anew for each update and the same for the whole batch, after k - 1 calls without autograd (``one``): the losses then
    hold for the uniform mixture of the images of all steps, and memory does not grow with K.

    Args:
        denoiser: network, schedule and kind of prediction; usually a copy of the teacher's.
        token_shape: ``(N, P*P*C)`` of an image.
        levels: s_1 > ... > s_K; 2.5 alone for a one-step generator, `falling_levels` for more.
        trained_steps: all or one.
        dtype: of the tokens.

    Raises:
        ValueError: if the levels do not fall or the schedule does not have them, or a word is none of those above.

    Source: Zhou et al., "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models
    for One-Step Generation", ICML 2024, with the level of its code; mixture: Zhou et al., "Few-Step Diffusion via Score
    identity Distillation", arXiv 2505.12674.
    """

    denoiser: Denoiser
    token_shape: tuple[int, int]
    levels: tuple[float, ...] = (2.5,)
    trained_steps: str = "all"
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if not self.levels or any(a <= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"the noise levels of the generator are {self.levels}, want at least one, and falling")
        if self.trained_steps not in TRAINED_STEPS:
            raise ValueError(f"trained_steps is {self.trained_steps!r}, want one of {', '.join(TRAINED_STEPS)}")
        for level in self.levels:
            time_of_level(self.denoiser.schedule, level)

    @property
    def num_steps(self) -> int:
        """Calls of the network for one image, K."""
        return len(self.levels)

    def __call__(self, labels: Tensor | None, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """Images after all K calls, as a sampler makes them; with autograd where it is on.

        Image i is a function of (seed, step, slots[i]) and its label.

        Args:
            labels: int64 ``[B]``, or None.
            seed: of the noise; z comes from `Stream.GENERATOR_NOISE`, eps from `Stream.SAMPLER_NOISE`.
            step: number of the update, 0 for samples, which have slots of their own; an int where one of several steps
                is drawn for training.
            slots: int64 ``[B]``.

        Returns:
            ``[B, N, P*P*C]``, not clipped.
        """
        return self._run(labels, self.num_steps, 0, seed=seed, step=step, slots=slots)

    def for_training(self, labels: Tensor | None, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """The images that the losses of update `step` see; arguments and result as of the call."""
        draw = {"seed": seed, "step": step, "slots": slots}
        if self.trained_steps == "all" or self.num_steps == 1:
            return self._run(labels, self.num_steps, 0, **draw)
        # Drawn on the host, so that nothing waits; slot 0, so that all processes and micro-batches agree.
        slot = torch.zeros(1, dtype=torch.int64, device="cpu")
        u = random.uniform(1, seed=seed, stream=Stream.GENERATOR_STEP, step=step, slots=slot).item()
        last = int(u * self.num_steps)
        return self._run(labels, last + 1, last, **draw)

    def _run(
        self,
        labels: Tensor | None,
        num_calls: int,
        first_with_grad: int,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> Tensor:
        image = None
        for k in range(num_calls):
            t = time_of_level(self.denoiser.schedule, self.levels[k])
            dtype = torch.int64 if isinstance(t, int) else self.dtype
            t = torch.full((slots.shape[0],), t, dtype=dtype, device=slots.device)
            alpha, sigma = (scale.to(self.dtype)[:, None, None] for scale in self.denoiser.schedule.alpha_sigma(t))
            with contextlib.nullcontext() if k >= first_with_grad else torch.no_grad():
                if image is None:
                    noise = self._noise(Stream.GENERATOR_NOISE, seed=seed, step=step, slots=slots)
                    xt = sigma * noise
                else:
                    number = step * self.num_steps + k
                    noise = self._noise(Stream.SAMPLER_NOISE, seed=seed, step=number, slots=slots)
                    xt = torch.addcmul(sigma * noise, alpha, image)
                image = self.denoiser(xt, t, labels)
        return image

    def _noise(self, stream: Stream, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        num = math.prod(self.token_shape)
        draws = random.normal(num, seed=seed, stream=stream, step=step, slots=slots, dtype=self.dtype)
        return draws.unflatten(1, self.token_shape)


def generate(
    generator: MakesImages,
    *,
    num_images: int,
    image_size: int,
    channels: int,
    patch_size: int,
    seed: int,
    first_slot: int = 0,
    labels: Tensor | None = None,
    batch_size: int,
    as_float: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate images, as `diffusion.sample` does with a teacher; image i depends on (seed, first_slot + i) and its
    label alone.

    Args:
        generator: the student, a `Generator` or what is called like one; the images are made on its device, in eval
            mode and without autograd.
        num_images: how many.
        image_size: side in pixels.
        channels: C.
        patch_size: side P of the patches of the network.
        seed: of the noise.
        first_slot: slot of the first image; later calls go on with ``first_slot + num_images``.
        labels: int64 ``[num_images]``, or None.
        batch_size: images per evaluation of the network.
        as_float: return float32 in about [-1, 1] instead of uint8.
        progress: called as ``progress(images done, num_images)`` after each batch.

    Returns:
        On the CPU, ``[num_images, image_size, image_size, C]``: uint8 ``round((x + 1) * 127.5)``, or float32.

    Raises:
        ValueError: if a number is less than 1, `labels` has another length, or the generator makes other images.
    """
    for name, value in {"num_images": num_images, "batch_size": batch_size, "patch_size": patch_size}.items():
        if value < 1:
            raise ValueError(f"generate: {name} is {value}, want at least 1")
    token_shape = ((image_size // patch_size) ** 2, patch_size**2 * channels)
    if image_size % patch_size or token_shape != generator.token_shape:
        raise ValueError(
            f"generate: images of {image_size} px, {channels} channels and patch_size {patch_size} have "
            f"{list(token_shape)} tokens and values, but the generator makes {list(generator.token_shape)}"
        )
    if labels is not None and labels.shape != (num_images,):
        raise ValueError(f"generate: labels has shape {list(labels.shape)}, want [{num_images}], one per image")
    device = generator.denoiser.device
    images = torch.empty(num_images, image_size, image_size, channels, dtype=torch.float32 if as_float else torch.uint8)
    with eval_mode(generator.denoiser.model), torch.inference_mode():
        for start in range(0, num_images, batch_size):
            end = min(start + batch_size, num_images)
            slots = torch.arange(first_slot + start, first_slot + end, device=device)
            of_batch = None if labels is None else labels[start:end].to(device)
            x = generator(of_batch, seed=seed, step=0, slots=slots)
            pixels = unpatchify(x, patch_size, image_size, image_size, channels).permute(0, 2, 3, 1)
            images[start:end] = pixels if as_float else ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
            if progress is not None:
                progress(end, num_images)
    return images
