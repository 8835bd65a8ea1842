"""Options of the commands that draw images from a run, and the drawing."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from maskdm_fast.train.config_json import check_finite
from maskdm_fast.train.generation import generate
from maskdm_fast.train.progress import step_bar
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import make_world


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How images are drawn from a run."""

    steps: int | None = None
    """Steps of the sampler, 1 to 1000: more is slower and usually better. Default: 50, or those that a distilled run
    was made for."""
    sampler: Literal["ddim", "ddpm", "euler", "heun", "dpmpp_2m"] = "ddim"
    """ddim; dpmpp_2m, which gets by with fewer steps; heun, with two evaluations per step; euler; or the ancestral
    ddpm, which wants more steps."""
    eta: float | None = None
    """Noise that ddim adds at each step: 0 (none, the default) to 1 (as much as ddpm)."""
    guidance: float = 1.0
    """Guidance scale towards the class: 1 (none) follows the classes as trained, more exaggerates them at the cost of
    variety and of twice the time. Wants a run with classes and label drop."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels sigma/alpha between these two, lowest and highest. Default: at all."""
    value_guidance: float = 0.0
    """Of a run of DxMI: how far each step moves on towards what its value takes for real. Published: up to 0.5; the
    value of a short run is flat and takes more."""
    seed: int = 0
    """Seed of the noise."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the trained weights themselves."""
    batch_size: int = 64
    """Images per evaluation of the network; changes speed and memory only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:INDEX."""

    def check(self) -> None:
        """Raise ValueError for the first value that no run can be drawn with."""
        check_finite({f"--{f.name.replace('_', '-')}": getattr(self, f.name) for f in dataclasses.fields(self)})
        for name, least in (("steps", 1), ("guidance", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, want at least {least}")


def draw(
    weights: Weights, options: DrawOptions, num_images: int, *, first_slot: int = 0, labels: Tensor | None = None
) -> Tensor:
    """Images of slots ``first_slot ... first_slot + num_images - 1``: uint8 ``[num_images, h, w, C]`` on the CPU, or
    latents as `generate` returns them.

    Without `labels` a class-conditional run cycles through its classes.
    """
    with step_bar("sampling") as progress:
        return generate(
            weights.config,
            weights.tensors,
            num_images,
            num_steps=options.steps,
            sampler=options.sampler,
            eta=options.eta,
            guidance=options.guidance,
            guidance_interval=options.guidance_interval,
            value_guidance=options.value_guidance,
            value=weights.value if options.value_guidance else None,
            seed=options.seed,
            first_slot=first_slot,
            labels=labels,
            batch_size=options.batch_size,
            device=make_world(options.device).device,
            progress=progress,
        )
