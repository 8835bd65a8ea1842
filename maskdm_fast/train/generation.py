"""Sampling from the weights of a run, whatever its stage was."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maskdm_fast import distill
from maskdm_fast.diffusion import Denoiser, sample
from maskdm_fast.models import UViT
from maskdm_fast.train.config import (
    DenoisingConfig,
    PolicyDistillationConfig,
    RegressionConfig,
    RunConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.regression_config import is_told
from maskdm_fast.train.students import policy_generator, without_sigmas
from maskdm_fast.train.values import make_value
from maskdm_fast.train.weights import Tensors


@dataclass(frozen=True)
class SamplerOptions:
    """How a denoising network is sampled, as `maskdm_fast.diffusion.sample`; of a student all keep their defaults."""

    num_steps: int | None = None
    sampler: str = "ddim"
    eta: float | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    value_guidance: float = 0.0
    value: Tensors | None = field(default=None, compare=False)

    def check_student(self, stage: str, num_steps: int) -> None:
        """Raise ValueError if anything is asked for that a student of so many steps cannot do."""
        if self.num_steps not in (None, num_steps):
            raise ValueError(
                f"the run is a {stage} of {num_steps} step{'s' if num_steps > 1 else ''}, but {self.num_steps} were "
                "asked for"
            )
        if self != SamplerOptions(self.num_steps, value_guidance=self.value_guidance):
            raise ValueError(f"the run is a {stage}, which has its own sampler: leave out sampler, eta and guidance")


def meta_network(config: RunConfig) -> UViT | distill.GuidedNetwork:
    """The network of a run, without memory; one that is told its guidance has the other inside."""
    with torch.device("meta"):
        network = UViT(config.model)
        return distill.GuidedNetwork(network) if is_told(config.stage) else network


def make_denoiser(config: RunConfig, tensors: Tensors, device: torch.device) -> Denoiser:
    """The denoiser of a run, with the given state dict of its model; of a network that is told its guidance take
    ``model.at(...)``."""
    model = meta_network(config)
    # assign keeps the tensors that were read, so the weights are in memory once; `.to` copies only if it must.
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return Denoiser(model, config.diffusion.noise_schedule(config.model), config.diffusion.prediction)


def generate(
    config: RunConfig,
    tensors: Tensors,
    num_images: int,
    *,
    num_steps: int | None = None,
    sampler: str = "ddim",
    eta: float | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    value_guidance: float = 0.0,
    value: Tensors | None = None,
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
        num_steps: of the sampler; None: 50 of a denoising network, those that a student was made for.
        value_guidance: of a policy, as `maskdm_fast.distill.dxmi_policy.generate`.
        value: state dict of the value that it follows, `Weights.value`.
        device: where to compute; the other arguments are those of `maskdm_fast.diffusion.sample`. A student brings its
            own sampler.

    Returns:
        uint8 ``[num_images, h, w, C]`` on the CPU; of a run on latents float16 ``[num_images, C, h, w]``, in the
        autoencoder's own scale.

    Raises:
        ValueError: an argument is out of range, or is not for a student; there is guidance, but the model has no
            classes, or has not learnt to do without them.
    """
    model = config.model
    if value_guidance and not isinstance(config.stage, PolicyDistillationConfig):
        raise ValueError("the run has no value to follow, which DxMI trains: leave out value_guidance")
    if labels is None and model.num_classes:
        labels = torch.arange(first_slot, first_slot + num_images) % model.num_classes
    images = _DRAW[type(config.stage)](
        config,
        tensors,
        SamplerOptions(num_steps, sampler, eta, guidance, guidance_interval, value_guidance, value),
        device,
        num_images=num_images,
        image_size=model.image_size,
        channels=model.channels,
        patch_size=model.patch_size,
        seed=seed,
        first_slot=first_slot,
        labels=labels,
        batch_size=batch_size,
        as_float=config.latents is not None,
        progress=progress,
    )
    if config.latents is None:
        return images
    return (images / config.latents.scale + config.latents.shift).permute(0, 3, 1, 2).half()


def _denoise(
    config: RunConfig, tensors: Tensors, options: SamplerOptions, device: torch.device, **drawn: Any
) -> Tensor:
    return _in_steps(make_denoiser(config, tensors, device), config, options, **drawn)


def _in_steps(denoiser: Denoiser, config: RunConfig, options: SamplerOptions, **drawn: Any) -> Tensor:
    if options.guidance != 1.0 and config.model.num_classes:
        config.stage.check_guidable("the run")
    return sample(
        denoiser,
        sampler=options.sampler,
        num_steps=config.stage.sampling_steps if options.num_steps is None else options.num_steps,
        eta=options.eta,
        guidance=options.guidance,
        guidance_interval=options.guidance_interval,
        bound=data_bound(config),
        **drawn,
    )


def data_bound(config: RunConfig) -> float:
    """The greatest absolute value of the data, to which samplers clip: 1 for images."""
    return 1.0 if config.latent_bound is None else config.latent_bound


def _regressed(
    config: RunConfig, tensors: Tensors, options: SamplerOptions, device: torch.device, **drawn: Any
) -> Tensor:
    """Of a student by regression. To be told a scale of guidance costs it no second evaluation."""
    stage, denoiser = config.stage, make_denoiser(config, tensors, device)
    if is_told(stage):
        if options.guidance_interval is not None:
            raise ValueError("the run is a student that is guided alike at all noise levels: leave out its interval")
        denoiser = dataclasses.replace(denoiser, model=denoiser.model.at(stage.strength_of(options.guidance)))
        options = dataclasses.replace(options, guidance=1.0)
    if stage.method == "guided":
        return _in_steps(denoiser, config, options, **drawn)
    options.check_student(f"{stage.method} student", stage.sampling_steps)
    if stage.method == "progressive":
        transitions = distill.progressive_transitions(denoiser.schedule, stage.num_steps)
    else:
        transitions = distill.consistency_transitions(denoiser.schedule, stage.sampling_levels)
    return sample(denoiser, transitions=transitions, bound=data_bound(config), **drawn)


def _generate(
    config: RunConfig, tensors: Tensors, options: SamplerOptions, device: torch.device, **drawn: Any
) -> Tensor:
    levels = config.stage.input_levels()
    options.check_student("generator", len(levels))
    shape = (config.model.num_tokens, config.model.token_dim)
    return distill.generate(distill.Generator(make_denoiser(config, tensors, device), shape, levels), **drawn)


def _follow_policy(
    config: RunConfig, tensors: Tensors, options: SamplerOptions, device: torch.device, **drawn: Any
) -> Tensor:
    options.check_student("policy", config.stage.num_steps)
    network, sigmas = without_sigmas(tensors)
    shape = (config.model.num_tokens, config.model.token_dim)
    policy = policy_generator(config.stage, make_denoiser(config, network, device), sigmas, shape)
    value = None if options.value is None else make_value(config, options.value, device)
    policy = dataclasses.replace(policy, value=value, value_guidance=options.value_guidance)
    return distill.generate(policy, **drawn)


_DRAW: dict[type, Callable[..., Tensor]] = {
    DenoisingConfig: _denoise,
    ScoreDistillationConfig: _generate,
    RegressionConfig: _regressed,
    PolicyDistillationConfig: _follow_policy,
}
"""Samplers by the configuration of the stage."""
