"""What the samplers do, as numbers: every sampler is a list of linear steps, one evaluation of the network each,

    x <- c_x0 x0 + c_xt x + c_last x0_last + std z,    x0 = denoiser(x, t),    z ~ N(0, I)

where ``x0_last`` is the estimate of the step before. The coefficients are worked out on the host in float64 from the
alpha and sigma of the visited times alone, so the samplers know nothing of the kind of schedule or prediction. With s a
time after t (less noise), ``level = sigma/alpha`` and ``rho = snr_t / snr_s = (level_s / level_t)^2``. The last step
leads to the clean image: alpha = 1, sigma = 0.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdm_fast.diffusion.schedule import FlowSchedule, NoiseSchedule, even_places, karras_levels

SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpmpp_2m")


@dataclass(frozen=True)
class Transition:
    """One step, as above: `t` is where the network is evaluated."""

    t: float
    c_x0: float
    c_xt: float
    c_last: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class _Level:
    """A visited time with its scales, and ``half_log_snr = ln(alpha / sigma)``."""

    t: float
    alpha: float
    sigma: float
    half_log_snr: float

    @property
    def noise(self) -> float:
        """``sigma / alpha``."""
        return math.exp(-self.half_log_snr)


_CLEAN = _Level(math.nan, 1.0, 0.0, math.inf)


def make_transitions(
    schedule: NoiseSchedule, sampler: str, num_steps: int, eta: float | None = None
) -> list[Transition]:
    """The steps of the sampler of this name.

    Args:
        schedule: the schedule of the denoiser.
        sampler: one of `SAMPLERS`.
        num_steps: its steps, at least 1; of ddim and ddpm on a discrete schedule at most T.
        eta: of ddim, 0 (the default) to 1; None for the others.

    Raises:
        ValueError: if an argument is out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}, want one of {', '.join(SAMPLERS)}")
    if sampler == "ddim":
        return ddim_transitions(schedule, num_steps, 0.0 if eta is None else eta)
    if eta is not None:
        raise ValueError(f"eta is {eta}, but sampler {sampler!r} has none; leave it None or choose 'ddim'")
    make = {
        "ddpm": ddpm_transitions,
        "euler": euler_transitions,
        "heun": heun_transitions,
        "dpmpp_2m": dpmpp_2m_transitions,
    }[sampler]
    return make(schedule, num_steps)


def ddim_transitions(schedule: NoiseSchedule, num_steps: int, eta: float) -> list[Transition]:
    """DDIM on the even times of the schedule. First order.

        std = eta sigma_s sqrt(1 - rho)
        c   = sqrt(sigma_s^2 - std^2) = sigma_s sqrt(1 - eta^2 + eta^2 rho)
        x_s = alpha_s x0 + c eps + std z,    eps = (x_t - alpha_t x0) / sigma_t

    The second form of c is a sum of terms that are not negative: no rounding makes its root a NaN.

    Args:
        schedule: the schedule of the denoiser.
        num_steps: evaluations of the network.
        eta: 0 (deterministic) to 1 (as much noise as DDPM).

    Raises:
        ValueError: if `num_steps` or `eta` is out of range.

    Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}, want 0 (deterministic) to 1")
    return ddim_transitions_at(schedule, schedule.sampling_times(num_steps), eta)


def ddim_transitions_at(schedule: NoiseSchedule, times: Sequence[float], eta: float = 0.0) -> list[Transition]:
    """`ddim_transitions` on falling `times` of the caller's choice, and from the last of them to the clean image."""
    return _straight(_levels(schedule, times), eta)


def ddpm_transitions(schedule: NoiseSchedule, num_steps: int) -> list[Transition]:
    """Ancestral sampling: x_s from the posterior ``q(x_s | x_t, x0)``, which is DDIM with eta = 1.

        c_x0 = alpha_s (1 - rho),    c_xt = rho alpha_s / alpha_t,    std = sigma_s sqrt(1 - rho)

    Args:
        schedule: the schedule of the denoiser.
        num_steps: evaluations of the network.

    Raises:
        ValueError: if `num_steps` is out of range.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 6 and 7.
    """
    return ddim_transitions(schedule, num_steps, eta=1.0)


def euler_transitions(schedule: NoiseSchedule, num_steps: int) -> list[Transition]:
    """Euler's method along the straight path of rectified flow, in steps of equal length. First order.

    With ``tau = sigma / (alpha + sigma)``, which is t of that flow, any state can be scaled to
    ``y = x / (alpha + sigma) = (1 - tau) x0 + tau eps``; the step ``y += (tau_s - tau_t)(eps - x0)`` keeps x0 and eps,
    as DDIM does. So this is DDIM at times that are even in tau, and for a flow the two are one.

    Args:
        schedule: the schedule of the denoiser.
        num_steps: evaluations of the network.

    Raises:
        ValueError: if `num_steps` is less than 1.

    Source: Liu et al., "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023.
    """
    start = _levels(schedule, schedule.sampling_times(1))[0]
    even = torch.tensor(FlowSchedule().sampling_times(num_steps), dtype=torch.float64)
    tau = even * (start.sigma / (start.alpha + start.sigma))
    return _straight(_levels_of_log_snr(schedule, 2.0 * (torch.log1p(-tau) - tau.log())), eta=0.0)


def heun_transitions(schedule: NoiseSchedule, num_steps: int) -> list[Transition]:
    """Heun's method for ``y = x / alpha`` over ``n = sigma / alpha``, on the grid of `karras_levels`. Second order.

        y'  = y + (n_s - n_t) d,    d = (y - x0) / n_t
        y_s = y + (n_s - n_t) (d + d') / 2,    d' = (y' - x0') / n_s

    The first line is a step of DDIM; after it, the second is ``x += alpha_s (n_t - n_s) / (2 n_s) (x0' - x0)``. Each
    step but the last evaluates the network twice. From the least noise level of the schedule, one step of DDIM leads to
    the clean image.

    Args:
        schedule: the schedule of the denoiser.
        num_steps: steps; ``2 num_steps - 1`` evaluations of the network.

    Raises:
        ValueError: if `num_steps` is less than 1.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    algorithm 1.
    """
    noise = karras_levels(even_places(num_steps), *schedule.noise_range)
    levels = _levels_of_log_snr(schedule, -2.0 * noise.log())
    transitions = []
    for index, predictor in enumerate(_straight(levels, eta=0.0)):
        transitions.append(predictor)
        if index + 1 < num_steps:
            here, there = levels[index], levels[index + 1]
            half = there.alpha * (here.noise - there.noise) / (2.0 * there.noise)
            transitions.append(Transition(there.t, half, 1.0, c_last=-half))
    return transitions


def dpmpp_2m_transitions(schedule: NoiseSchedule, num_steps: int) -> list[Transition]:
    """DPM-Solver++ (2M), multistep in the half log-SNR ``l = ln(alpha / sigma)``. Second order.

        x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) (x0 + (x0 - x0_last) / (2 r))

    with ``h = l_s - l_t`` and r the width of the step before over h. The first step and the last, to the clean image,
    are those of DDIM. The times are even in l from the greatest noise level of the schedule to the least.

    Args:
        schedule: the schedule of the denoiser.
        num_steps: evaluations of the network.

    Raises:
        ValueError: if `num_steps` is less than 1.

    Source: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022,
    algorithm 2.
    """
    least, greatest = schedule.noise_range
    even = torch.lerp(*torch.tensor([greatest, least], dtype=torch.float64).log(), even_places(num_steps))
    levels = _levels_of_log_snr(schedule, -2.0 * even)
    transitions = _straight(levels, eta=0.0)
    for index in range(1, num_steps - 1):
        before, here, there = levels[index - 1 : index + 2]
        if here.half_log_snr == before.half_log_snr:  # of a schedule of one time
            continue
        last = (there.half_log_snr - here.half_log_snr) / (2.0 * (here.half_log_snr - before.half_log_snr))
        step = transitions[index]
        transitions[index] = Transition(step.t, step.c_x0 * (1.0 + last), step.c_xt, c_last=-step.c_x0 * last)
    return transitions


def _straight(levels: list[_Level], eta: float) -> list[Transition]:
    """The steps of DDIM from each level to the next, and from the last to the clean image."""
    transitions = []
    for here, there in itertools.pairwise([*levels, _CLEAN]):
        exponent = 2.0 * (here.half_log_snr - there.half_log_snr)
        rho, one_minus_rho = math.exp(exponent), -math.expm1(exponent)
        c_xt = there.sigma * math.sqrt((1.0 - eta**2) + eta**2 * rho) / here.sigma
        std = eta * there.sigma * math.sqrt(one_minus_rho)
        transitions.append(Transition(here.t, there.alpha - c_xt * here.alpha, c_xt, std=std))
    return transitions


def _levels_of_log_snr(schedule: NoiseSchedule, log_snr: Tensor) -> list[_Level]:
    return _levels(schedule, schedule.t_of_log_snr(log_snr).tolist())


def _levels(schedule: NoiseSchedule, times: Sequence[float]) -> list[_Level]:
    t = torch.tensor(times, dtype=torch.float64)
    scales = (*schedule.alpha_sigma(t), 0.5 * schedule.log_snr(t))
    return [_Level(*row) for row in zip(times, *(scale.tolist() for scale in scales), strict=True)]
