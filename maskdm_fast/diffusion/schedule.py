"""Noise schedules: ``xt = alpha x0 + sigma eps``, ``alpha^2 = alpha_bar_t``, ``sigma^2 = 1 - alpha_bar_t``."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class NoiseSchedule:
    """A variance-preserving noise schedule in discrete time t = 0..T-1.

    Args:
        alpha_bar: float64 ``[T]``, inside (0, 1), strictly decreasing: the share of signal variance left at t.

    Raises:
        TypeError: if `alpha_bar` is not float64.
        ValueError: if its shape or values are not as above.
    """

    def __init__(self, alpha_bar: Tensor):
        if alpha_bar.dtype != torch.float64:
            raise TypeError(f"NoiseSchedule: alpha_bar is {alpha_bar.dtype}, want torch.float64")
        if alpha_bar.ndim != 1 or alpha_bar.numel() == 0:
            raise ValueError(f"NoiseSchedule: alpha_bar has shape {list(alpha_bar.shape)}, want [T] with T >= 1")
        if not ((alpha_bar > 0) & (alpha_bar < 1)).all() or not (alpha_bar.diff() < 0).all():
            raise ValueError("NoiseSchedule: alpha_bar must lie inside (0, 1) and strictly decrease")
        self.alpha_bar = alpha_bar.detach().cpu().clone()
        # Squares are subtracted in float64 and only the roots rounded: 1 - float32(alpha)^2 loses sigma near t = 0.
        table = torch.stack((self.alpha_bar.sqrt(), (1.0 - self.alpha_bar).sqrt())).to(torch.float32)
        self._tables = {torch.device("cpu"): table}

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alpha_bar.numel()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of signal and noise.

        Args:
            t: int64 of any shape, 0..T-1.

        Returns:
            ``(alpha, sigma)``, each float32 of the shape and on the device of `t`.
        """
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        alpha, sigma = self._tables[t.device]
        return alpha[t], sigma[t]


def linear_schedule(num_timesteps: int = 1000) -> NoiseSchedule:
    """``beta`` from 1e-4 to 0.02 in equal steps, times ``1000 / T``; ``alpha_bar = cumprod(1 - beta)``.

    Raises:
        ValueError: if `num_timesteps` is 20 or less, where the last beta would reach 1.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, section 4.
    """
    if num_timesteps <= 20:
        raise ValueError(f"linear_schedule: num_timesteps is {num_timesteps}, want more than 20; a cosine takes fewer")
    scale = 1000.0 / num_timesteps
    beta = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    return NoiseSchedule(torch.cumprod(1.0 - beta, dim=0))


def cosine_schedule(num_timesteps: int = 1000) -> NoiseSchedule:
    """``alpha_bar = cumprod(1 - beta)`` with ``beta_t = min(1 - f(t+1)/f(t), 0.999)``.

    ``f(u) = cos^2((u/T + 0.008) / 1.008 * pi/2)`` for u = 0..T.

    Raises:
        ValueError: if `num_timesteps` is less than 1.

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, equation 17.
    """
    if num_timesteps < 1:
        raise ValueError(f"cosine_schedule: num_timesteps is {num_timesteps}, want at least 1")
    u = torch.linspace(0.0, 1.0, num_timesteps + 1, dtype=torch.float64)
    f = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
    beta = (1.0 - f[1:] / f[:-1]).clamp(max=0.999)
    return NoiseSchedule(torch.cumprod(1.0 - beta, dim=0))


SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {"linear": linear_schedule, "cosine": cosine_schedule}


def make_schedule(name: str, num_timesteps: int = 1000) -> NoiseSchedule:
    """The schedule called `name`; raises ValueError with the known names for another."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}, want one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_timesteps)
