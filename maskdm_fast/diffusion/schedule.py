"""Noise schedules: ``xt = alpha(t) x0 + sigma(t) eps``. What "linear", "flow" or "edm" mean, and nothing else.

Every schedule is monotone: the signal-to-noise ratio ``alpha^2 / sigma^2`` falls as t grows. So any of them can be
asked for the time of a noise level, and one sampler serves them all.
"""

import abc
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_LEAST_NOISE, _MOST_NOISE = 0.002, 80.0
"""Noise levels sigma/alpha between which the continuous schedules are sampled (Karras et al., 2022, table 1)."""


class NoiseSchedule(Protocol):
    """How signal and noise are mixed at time t.

    Attributes:
        predictions: what a network may predict under this schedule, the natural choice first.
        num_timesteps: T of a discrete schedule, whose training times are 0..T-1; None if t is continuous.
        noise_range: the least and the greatest ``sigma/alpha`` that samplers visit.
    """

    predictions: tuple[str, ...] = ("eps", "x0", "v")
    num_timesteps: int | None = None
    noise_range: tuple[float, float] = (_LEAST_NOISE, _MOST_NOISE)

    @abc.abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of signal and noise.

        Args:
            t: of any shape.

        Returns:
            ``(alpha, sigma)``, of the shape and on the device of `t`; float64 if `t` is, else float32.
        """

    @abc.abstractmethod
    def time_input(self, t: Tensor) -> Tensor:
        """What the network is given for `t`: numbers of about 0..1000, for which its sinusoids are made."""

    @abc.abstractmethod
    def timesteps(self, u: Tensor) -> Tensor:
        """The times of training that belong to draws `u`, uniform in (0, 1), float64."""

    @abc.abstractmethod
    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time at which ``ln(alpha^2 / sigma^2)`` has this value, float64; the nearest there is, if none has."""

    @abc.abstractmethod
    def sampling_times(self, num_steps: int) -> list[float]:
        """The times, falling, at which a sampler with `num_steps` even steps evaluates the network.

        The last step leads from the last of them to the clean image.

        Raises:
            ValueError: if `num_steps` is out of range.
        """

    def log_snr(self, t: Tensor) -> Tensor:
        """``ln(alpha^2 / sigma^2)`` at `t`, float64; infinite where one of the two is 0."""
        alpha, sigma = self.alpha_sigma(t.to(torch.float64))
        return 2.0 * (alpha.log() - sigma.log())

    def nearest_timesteps(self, log_snr: Tensor) -> Tensor:
        """As `t_of_log_snr`, in the form of `timesteps`: whole numbers if the schedule is discrete."""
        t = self.t_of_log_snr(log_snr)
        return t.to(torch.float32) if self.num_timesteps is None else t.round().to(torch.int64)


class DiscreteSchedule(NoiseSchedule):
    """A variance-preserving schedule in discrete time t = 0..T-1: ``alpha^2 = alpha_bar_t, sigma^2 = 1 - alpha_bar_t``.

    Between two whole times the log-SNR is interpolated linearly, for samplers that place their steps by noise level.

    Args:
        alpha_bar: float64 ``[T]``, inside (0, 1), strictly decreasing: the share of signal variance left at t.
        first_input: what the network is given for t = 0; some codes count their times from 1.

    Raises:
        TypeError: if `alpha_bar` is not float64.
        ValueError: if its shape or values are not as above.
    """

    def __init__(self, alpha_bar: Tensor, first_input: int = 0):
        if alpha_bar.dtype != torch.float64:
            raise TypeError(f"DiscreteSchedule: alpha_bar is {alpha_bar.dtype}, want torch.float64")
        if alpha_bar.ndim != 1 or alpha_bar.numel() == 0:
            raise ValueError(f"DiscreteSchedule: alpha_bar has shape {list(alpha_bar.shape)}, want [T] with T >= 1")
        if not ((alpha_bar > 0) & (alpha_bar < 1)).all() or not (alpha_bar.diff() < 0).all():
            raise ValueError("DiscreteSchedule: alpha_bar must lie inside (0, 1) and strictly decrease")
        self.alpha_bar = alpha_bar.detach().cpu().clone()
        self.first_input = first_input
        self.num_timesteps = self.alpha_bar.numel()
        # Squares are subtracted in float64 and only the roots rounded: 1 - float32(alpha)^2 loses sigma near t = 0.
        table = torch.stack((self.alpha_bar.sqrt(), (1.0 - self.alpha_bar).sqrt())).to(torch.float32)
        log_snr = self.alpha_bar.log() - torch.log1p(-self.alpha_bar)
        self._tables = {torch.device("cpu"): (table, log_snr)}
        least, greatest = (-0.5 * log_snr[[0, -1]]).exp().tolist()
        self.noise_range = least, max(least, min(greatest, _MOST_NOISE))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `NoiseSchedule`; an integer `t`, in 0..T-1, reads a table; any other is interpolated, and clamped."""
        table, log_snr = self._on(t.device)
        if not t.is_floating_point():
            # Unlike table[:, t] this takes no -1 for T-1.
            return table.index_select(1, t.flatten()).view(2, *t.shape).unbind()
        place = t.to(torch.float64).clamp(0, self.num_timesteps - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=self.num_timesteps - 1)
        between = torch.lerp(log_snr[below], log_snr[above], place - below)
        return _unit_variance(between, torch.float64 if t.dtype == torch.float64 else torch.float32)

    def time_input(self, t: Tensor) -> Tensor:
        """`t` itself, or counted from `first_input`."""
        return t + self.first_input if self.first_input else t

    def timesteps(self, u: Tensor) -> Tensor:
        """``floor(u T)``, int64. The product is exact in float64, so a uniform below 1 never reaches T."""
        return (u.to(torch.float64) * self.num_timesteps).long()

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """See `NoiseSchedule`: 0..T-1, interpolated as in `alpha_sigma`."""
        rising = -self._on(log_snr.device)[1]
        value = -log_snr.to(torch.float64)
        if self.num_timesteps == 1:
            return torch.zeros_like(value)
        above = torch.searchsorted(rising, value.contiguous()).clamp(1, self.num_timesteps - 1)
        low, high = rising[above - 1], rising[above]
        return above - 1 + ((value - low) / (high - low)).clamp(0.0, 1.0)

    def sampling_times(self, num_steps: int) -> list[int]:
        """``floor(-1 + i T / num_steps)`` for i = num_steps..1, in integers; ``num_steps == T`` visits every time."""
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(
                f"num_steps is {num_steps}, want 1 to {self.num_timesteps}, the time steps of the noise schedule"
            )
        return [i * self.num_timesteps // num_steps - 1 for i in range(num_steps, 0, -1)]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._tables[torch.device("cpu")])
        return self._tables[device]


class VPSchedule(NoiseSchedule):
    """The variance-preserving SDE in continuous time t in [0, 1], its rate growing from `beta_min` to `beta_max`:

        ln alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,    sigma^2 = 1 - alpha^2

    The network is given 999 t, as in U-ViT.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    appendix C; Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0.0 < beta_min < beta_max < math.inf:
            raise ValueError(
                f"VPSchedule: beta_min is {beta_min} and beta_max {beta_max}, want 0 < beta_min < beta_max < infinity"
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        time = t.to(torch.float64)
        log_alpha = -0.25 * (self.beta_max - self.beta_min) * time**2 - 0.5 * self.beta_min * time
        return _rounded(log_alpha.exp(), (-torch.expm1(2.0 * log_alpha)).sqrt(), t.dtype)

    def time_input(self, t: Tensor) -> Tensor:
        return 999.0 * t

    def timesteps(self, u: Tensor) -> Tensor:
        return u.to(torch.float32)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        # -2 ln alpha = softplus(-log_snr) = t^2 (beta_max - beta_min) / 2 + t beta_min, solved without cancellation.
        # At beta_max that is past t = 1; more, up to infinity, would say the same.
        value = torch.nn.functional.softplus(-log_snr.to(torch.float64)).clamp(max=self.beta_max)
        root = (self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * value).sqrt()
        return (2.0 * value / (self.beta_min + root)).clamp(0.0, 1.0)

    def sampling_times(self, num_steps: int) -> list[float]:
        return _even_times(num_steps)


class FlowSchedule(NoiseSchedule):
    """Rectified flow, t in [0, 1]: ``alpha = 1 - t``, ``sigma = t``. The network is given 1000 t.

    Source: Liu et al., "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023.
    """

    predictions = ("flow", "x0")  # eps says nothing about the image at t = 1, where alpha is 0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        time = t.to(torch.float64)
        return _rounded(1.0 - time, time, t.dtype)

    def time_input(self, t: Tensor) -> Tensor:
        return 1000.0 * t

    def timesteps(self, u: Tensor) -> Tensor:
        return u.to(torch.float32)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr.to(torch.float64))

    def sampling_times(self, num_steps: int) -> list[float]:
        return _even_times(num_steps)


class EDMSchedule(NoiseSchedule):
    """The noise of EDM; t is the noise level s itself, 0.002..80:

        xt = c_in (x0 + s eps),    c_in = 1 / sqrt(s^2 + sigma_data^2)

    The state is what the preconditioned network reads, so alpha = c_in and sigma = s c_in. With prediction "edm" the
    network's own output is the F of the paper: ``x0 = c_skip (x0 + s eps) + c_out F``. It is given 100 ln s, which is
    400 times the paper's c_noise. Uniform draws become times, and even steps are placed, by `karras_levels`.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
    """

    predictions = ("edm", "x0")
    sigma_data = 0.5

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = t.to(torch.float64)
        c_in = (level**2 + self.sigma_data**2).rsqrt()
        return _rounded(c_in, level * c_in, t.dtype)

    def time_input(self, t: Tensor) -> Tensor:
        return 100.0 * t.log()

    def timesteps(self, u: Tensor) -> Tensor:
        return karras_levels(1.0 - u.to(torch.float64), *self.noise_range).to(torch.float32)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr.to(torch.float64))

    def sampling_times(self, num_steps: int) -> list[float]:
        return karras_levels(even_places(num_steps), *self.noise_range).tolist()


def karras_levels(place: Tensor, least: float, greatest: float, rho: float = 7.0) -> Tensor:
    """Noise levels ``(greatest^(1/rho) + place (least^(1/rho) - greatest^(1/rho)))^rho`` for `place` in 0..1.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    equation 5.
    """
    return torch.lerp(place.new_full((), greatest ** (1 / rho)), place.new_full((), least ** (1 / rho)), place) ** rho


def even_places(num_steps: int) -> Tensor:
    """``i / (num_steps - 1)`` for i = 0..num_steps-1, float64; 0 alone for one step.

    Raises:
        ValueError: if `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, want at least 1")
    return torch.linspace(0.0, 1.0, num_steps, dtype=torch.float64)


def linear_schedule(num_timesteps: int = 1000) -> DiscreteSchedule:
    """``beta`` from 1e-4 to 0.02 in equal steps, times ``1000 / T``; ``alpha_bar = cumprod(1 - beta)``.

    Raises:
        ValueError: if `num_timesteps` is 20 or less, where the last beta would reach 1.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, section 4.
    """
    if num_timesteps <= 20:
        raise ValueError(f"linear_schedule: num_timesteps is {num_timesteps}, want more than 20; a cosine takes fewer")
    scale = 1000.0 / num_timesteps
    beta = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    return DiscreteSchedule(torch.cumprod(1.0 - beta, dim=0))


def scaled_linear_schedule() -> DiscreteSchedule:
    """1000 times, ``sqrt(beta)`` from that of 0.00085 to that of 0.012 in equal steps; the network is given t + 1.

    What latent diffusion and U-ViT-H were trained with; U-ViT counts the times from 1. It ends before the image is all
    noise, with a signal-to-noise ratio of 0.005.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, and Bao et al.,
    "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023, by their codes.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return DiscreteSchedule(torch.cumprod(1.0 - beta, dim=0), first_input=1)


def cosine_schedule(num_timesteps: int = 1000) -> DiscreteSchedule:
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
    return DiscreteSchedule(torch.cumprod(1.0 - beta, dim=0))


def shifted_cosine_schedule(image_size: int, num_timesteps: int = 1000) -> DiscreteSchedule:
    """The cosine schedule with ``2 ln(64 / image_size)`` added to its log-SNR: larger images are noised more.

    Neighbouring pixels of a larger image say the same, so the same noise hides less of it. At 64 px it is the cosine.

    Raises:
        ValueError: if `image_size` or `num_timesteps` is less than 1.

    Source: Hoogeboom et al., "simple diffusion: End-to-end diffusion for high resolution images", ICML 2023,
    section 3.1.
    """
    if image_size < 1:
        raise ValueError(f"shifted_cosine_schedule: image_size is {image_size}, want the side of the images in pixels")
    log_snr = torch.logit(cosine_schedule(num_timesteps).alpha_bar) + 2.0 * math.log(64 / image_size)
    return DiscreteSchedule(torch.sigmoid(log_snr))


SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": lambda image_size: linear_schedule(),
    "scaled-linear": lambda image_size: scaled_linear_schedule(),
    "cosine": lambda image_size: cosine_schedule(),
    "shifted-cosine": shifted_cosine_schedule,
    "vp": lambda image_size: VPSchedule(),
    "flow": lambda image_size: FlowSchedule(),
    "edm": lambda image_size: EDMSchedule(),
}
"""From names to schedules, given the side of the images."""


def make_schedule(name: str, image_size: int = 64) -> NoiseSchedule:
    """The schedule called `name`, the discrete ones with 1000 times.

    Args:
        name: linear, scaled-linear, cosine, shifted-cosine, vp, flow or edm.
        image_size: side of the images in pixels; only shifted-cosine asks for it.

    Raises:
        ValueError: if there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}, want one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](image_size)


def _even_times(num_steps: int) -> list[float]:
    """``i / num_steps`` for i = num_steps..1."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, want at least 1")
    return [i / num_steps for i in range(num_steps, 0, -1)]


def _unit_variance(log_snr: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """alpha and sigma with ``alpha^2 + sigma^2 = 1``."""
    return torch.sigmoid(log_snr).sqrt().to(dtype), torch.sigmoid(-log_snr).sqrt().to(dtype)


def _rounded(alpha: Tensor, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in float64 if that is the `dtype` of the times, else in float32."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return alpha.to(dtype), sigma.to(dtype)
