"""Sampling from the weights of a run."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskdm_fast.diffusion import Denoiser, sample
from maskdm_fast.models import UViT
from maskdm_fast.train.config import RunConfig


def make_denoiser(config: RunConfig, tensors: dict[str, Tensor], device: torch.device) -> Denoiser:
    """The denoiser of a run, with the given state dict of its model."""
    with torch.device("meta"):
        model = UViT(config.model)
    # assign keeps the tensors that were read, so the weights are in memory once; `.to` copies only if it must.
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return Denoiser(model, config.diffusion.noise_schedule(config.model), config.diffusion.prediction)


def generate(
    config: RunConfig,
    tensors: dict[str, Tensor],
    num_images: int,
    *,
    num_steps: int,
    sampler: str = "ddim",
    eta: float | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    first_slot: int = 0,
    labels: Tensor | None = None,
    batch_size: int = 64,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample images; a class-conditional model without `labels` cycles through its classes.

    Args:
        config: of the run.
        tensors: state dict of its model, raw or averaged.
        num_images: how many.
        device: where to compute; the other arguments are those of `maskdm_fast.diffusion.sample`.

    Returns:
        uint8 ``[num_images, h, w, C]`` on the CPU; of a run on latents float16 ``[num_images, C, h, w]``, in the
        autoencoder's own scale.

    Raises:
        ValueError: an argument is out of range, or there is guidance but the model has no classes.
    """
    model = config.model
    if labels is None and model.num_classes:
        labels = torch.arange(first_slot, first_slot + num_images) % model.num_classes
    images = sample(
        make_denoiser(config, tensors, device),
        num_images=num_images,
        image_size=model.image_size,
        channels=model.channels,
        patch_size=model.patch_size,
        sampler=sampler,
        num_steps=num_steps,
        eta=eta,
        guidance=guidance,
        guidance_interval=guidance_interval,
        seed=seed,
        first_slot=first_slot,
        labels=labels,
        batch_size=batch_size,
        bound=1.0 if config.latent_bound is None else config.latent_bound,
        as_float=config.latents is not None,
        progress=progress,
    )
    if config.latents is None:
        return images
    return (images / config.latents.scale + config.latents.shift).permute(0, 3, 1, 2).half()
