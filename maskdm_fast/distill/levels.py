"""Noise levels ``s = sigma/alpha``, and the times at which a schedule has them.

Everything that the published recipes say in the units of EDM (the generator's input at 2.5, training levels up to 24.4)
holds for every schedule once it is said as a noise level: with ``x_edm = xt / alpha`` the estimates of x0, the losses
and their gradients are the same numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.diffusion import NoiseSchedule
from maskdm_fast.diffusion.schedule import karras_levels
from maskdm_fast.random import Stream

DRAWS = ("karras", "lognormal", "uniform")

_NUM_QUANTILES = 2**16


@dataclasses.dataclass(frozen=True)
class LevelDraw:
    """At which noise levels a network is trained, one per image; the same ones on every schedule.

        karras:     s^(1/7) uniform
        lognormal:  ln s ~ N(mean, std^2)
        uniform:    t as the schedule draws it in training (t itself uniform, but for EDM)

    each between `least` and `greatest`, and within the levels that the schedule has: what lies outside is not drawn, so
    no level gathers the draws of those beyond it.

    Args:
        kind: karras, lognormal or uniform.
        least: smallest s, more than 0.
        greatest: largest s.
        mean: of lognormal, natural logarithm.
        std: of lognormal, more than 0.

    Raises:
        ValueError: if a value is not one of those above.

    Source: karras and lognormal: the code of Zhou et al., "Score identity Distillation: Exponentially Fast Distillation
    of Pretrained Diffusion Models for One-Step Generation", ICML 2024. uniform: that of Zhou et al., "Long and Short
    Guidance in Score identity Distillation for One-Step Text-to-Image Generation", ICLR 2025.
    """

    kind: str = "karras"
    least: float = 0.002
    greatest: float = 24.408
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if self.kind not in DRAWS:
            raise ValueError(f"unknown draw of noise levels {self.kind!r}, want one of {', '.join(DRAWS)}")
        if not 0.0 < self.least < self.greatest:
            raise ValueError(f"noise levels from {self.least} to {self.greatest}, want 0 < least < greatest")
        if not self.std > 0:
            raise ValueError(f"the std of the noise levels is {self.std}, want more than 0")

    def __call__(
        self,
        schedule: NoiseSchedule,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
        stream: Stream = Stream.TIMESTEP,
    ) -> Tensor:
        """Draw the times of a (micro-)batch.

        Args:
            schedule: whose times.
            seed: run seed.
            step: number of the update.
            slots: int64 ``[B]``, places in the global batch.
            stream: of the draw.

        Returns:
            ``[B]``, int64 for a discrete schedule, else float32.

        Raises:
            ValueError: if the schedule has none of the levels.
        """
        u = random.uniform(1, seed=seed, stream=stream, step=step, slots=slots)[:, 0].to(torch.float64)
        return self.times(schedule, u)

    def times(self, schedule: NoiseSchedule, u: Tensor) -> Tensor:
        """The times of draws `u`, float64, uniform in (0, 1): the quantile function, rising in s."""
        least, greatest = self._range(schedule)
        if self.kind == "uniform":
            first, last = _share_below(schedule, least * (1 - 1e-6)), _share_below(schedule, greatest * (1 + 1e-6))
            return schedule.timesteps(first + u * (last - first))
        if self.kind == "karras":
            log_level = karras_levels(1.0 - u, least, greatest).log()
        else:
            first, last = (self._share(level) for level in (least, greatest))
            log_level = self.mean + self.std * torch.special.ndtri(first + u * (last - first))
        return schedule.nearest_timesteps(-2.0 * log_level)

    def expectation(self, schedule: NoiseSchedule, function: Callable[[Tensor, Tensor], Tensor]) -> float:
        """The mean of ``function(alpha, sigma)`` over the draw, from 65536 quantiles, in float64 on the CPU."""
        u = (torch.arange(_NUM_QUANTILES, dtype=torch.float64, device="cpu") + 0.5) / _NUM_QUANTILES
        alpha, sigma = schedule.alpha_sigma(self.times(schedule, u))
        return function(alpha.to(torch.float64), sigma.to(torch.float64)).mean().item()

    def _range(self, schedule: NoiseSchedule) -> tuple[float, float]:
        least, greatest = schedule.noise_range
        if not max(least, self.least) < min(greatest, self.greatest):
            raise ValueError(
                f"noise levels from {self.least} to {self.greatest}, but {type(schedule).__name__} has those from "
                f"{least:.3g} to {greatest:.3g}"
            )
        return max(least, self.least), min(greatest, self.greatest)

    def _share(self, level: float) -> float:
        """Of the draws of lognormal, those below `level`."""
        return 0.5 * math.erfc((self.mean - math.log(level)) / (self.std * math.sqrt(2.0)))


@functools.lru_cache(maxsize=256)
def time_of_level(schedule: NoiseSchedule, level: float) -> int | float:
    """The time at which ``sigma/alpha`` is `level`: the nearest whole one of a discrete schedule.

    Raises:
        ValueError: if `level` is outside the noise range of the schedule.
    """
    least, greatest = schedule.noise_range
    if not least <= level <= greatest * (1 + 1e-9):
        raise ValueError(
            f"the noise level sigma/alpha is {level:g}, but {type(schedule).__name__} has those from {least:.3g} to "
            f"{greatest:.3g}"
        )
    return schedule.nearest_timesteps(torch.tensor(-2.0 * math.log(level), dtype=torch.float64, device="cpu")).item()


def falling_levels(first: float, num_steps: int) -> tuple[float, ...]:
    """``first (K - k) / K`` for k = 0..K-1: the input levels of a K-step generator.

    Raises:
        ValueError: if `num_steps` is less than 1.

    Source: the EDM2 branch of the code of Zhou et al., "Adversarial Score identity Distillation", ICLR 2025.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, want at least 1")
    return tuple(first * (num_steps - k) / num_steps for k in range(num_steps))


@functools.lru_cache(maxsize=256)
def _share_below(schedule: NoiseSchedule, level: float) -> float:
    """The u below which ``schedule.timesteps(u)`` has levels of at most `level`, by bisection: every schedule rises."""
    low, high = 0.0, 1.0
    for _ in range(53):
        middle = 0.5 * (low + high)
        log_snr = schedule.log_snr(schedule.timesteps(torch.tensor(middle, dtype=torch.float64, device="cpu")))
        low, high = (middle, high) if log_snr.item() >= -2.0 * math.log(level) else (low, middle)
    return low
