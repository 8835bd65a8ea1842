"""Which noise levels are trained how often."""

import dataclasses
import math

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.diffusion.schedule import NoiseSchedule
from maskdm_fast.random import Stream

DRAWS = ("uniform", "lognormal")


@dataclasses.dataclass(frozen=True)
class TimestepDraw:
    """Training times, one per image.

        uniform:    t = schedule.timesteps(u),    u uniform in (0, 1)
        lognormal:  t with ln(sigma/alpha) ~ N(mean, std^2), on every schedule (for flow that is the logit-normal t)

    With `num_strata` = S, the size of the global batch, the draws of one step are spread: u of slot i becomes
    ``(i + u)/S + offset`` modulo 1, with one offset for all slots of a step. Each t is distributed as before, but a
    batch covers the noise levels evenly, so its loss varies less. Slots are places in the global batch: neither ranks
    nor micro-batches change a draw.

    Args:
        kind: uniform or lognormal.
        mean: of lognormal, natural logarithm.
        std: of lognormal, more than 0.
        num_strata: as above; None: the draws are independent.

    Raises:
        ValueError: if a value is not one of those above.

    Source: lognormal: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    table 1, and Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024,
    equation 19. strata: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, appendix I.1.
    """

    kind: str = "uniform"
    mean: float = -1.2
    std: float = 1.2
    num_strata: int | None = None

    def __post_init__(self):
        if self.kind not in DRAWS:
            raise ValueError(f"unknown timestep draw {self.kind!r}, want one of {', '.join(DRAWS)}")
        if not math.isfinite(self.mean):
            raise ValueError(f"the mean of the timestep draw is {self.mean}, want a finite number")
        if not 0 < self.std < math.inf:
            raise ValueError(f"the std of the timestep draw is {self.std}, want more than 0, and finite")
        if self.num_strata is not None and self.num_strata < 1:
            raise ValueError(f"num_strata is {self.num_strata}, want the size of the global batch, or None")

    def __call__(self, schedule: NoiseSchedule, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """Draw the times of a (micro-)batch.

        Args:
            schedule: whose times.
            seed: run seed.
            step: optimizer step.
            slots: int64 ``[B]``, places in the global batch.

        Returns:
            ``[B]``, int64 for a discrete schedule, else float32.
        """
        u = self.uniform(seed=seed, step=step, slots=slots)
        if self.kind == "uniform":
            return schedule.timesteps(u)
        return schedule.nearest_timesteps(-2.0 * self.log_level(u))

    def uniform(self, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """The uniform draws that become times, float64 ``[B]`` in (0, 1); arguments as for these."""
        draw = {"seed": seed, "stream": Stream.TIMESTEP, "step": step}
        if self.num_strata is None:
            return random.uniform(1, slots=slots, **draw)[:, 0].to(torch.float64)
        # The offset is the second element of slot 0, whose first one belongs to that slot's image.
        pairs = random.uniform(2, slots=torch.cat((slots, slots.new_zeros(1))), **draw).to(torch.float64)
        u = ((slots % self.num_strata + pairs[:-1, 0]) / self.num_strata + pairs[-1, 1]) % 1.0
        # The sum may round to 0 or 1, which the open interval does not have.
        return u.clamp(2.0**-32, 1.0 - 2.0**-32)

    def log_level(self, u: Tensor) -> Tensor:
        """``ln(sigma / alpha)`` of lognormal for the uniform draws `u`."""
        return self.mean + self.std * torch.special.ndtri(u)
