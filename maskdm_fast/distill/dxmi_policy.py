"""Gaussian policies of few steps: a teacher's own ancestral sampler, whose network and noise are then trained.

A step of the policy at state x, with a the share of signal variance before it and a' the one after it, is

    mean = c_x0 x0 + c_xt x,    x0 = denoiser(scale x, t)

All numbers are worked out on the host in float64, from noise levels alone, so that every schedule and prediction that
`Denoiser` knows can be the teacher.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from maskdm_fast.diffusion import Denoiser, NoiseSchedule
from maskdm_fast.diffusion.prediction import x0_coefficients
from maskdm_fast.diffusion.schedule import even_places, karras_levels
from maskdm_fast.distill.dxmi_rollout import Policy, Value, draw_rollout

Mean = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Called as ``mean(x, index, labels)``, of the shape of x."""

_LEAST_STD = 1e-3
"""A step that would add no noise gets this much, so that its logarithm exists."""


@dataclasses.dataclass(frozen=True)
class PolicyStep:
    """One step, as above: `t` is the teacher's time, `std` the noise before training."""

    t: float
    scale: float
    c_x0: float
    c_xt: float
    std: float


@dataclasses.dataclass(frozen=True)
class PolicySchedule:
    """The steps of a policy, noisiest first, and the standard deviation of x_0."""

    start_std: float
    steps: tuple[PolicyStep, ...]


def fastdpm_alpha_bars(num_steps: int, end: float, *, first: float = 1e-4) -> list[float]:
    """The noise levels of FastDPM with quadratic variances, as shares of signal variance, noisiest first.

        eta_i = first (1 + i x)^2,    alpha_bar_i = product over j <= i of (1 - eta_j),    i = 0..T-1

    with the x >= 0 at which the last one is `end`, but at most ``0.95 / (sqrt(first) T)``, which keeps every eta below
    1. With few steps that limit holds, and the policy starts at less noise than the teacher: ``alpha_bar`` 0.0208 for
    T = 10, 0.343 for T = 4.

    Args:
        num_steps: T.
        end: share of signal variance in the teacher's noisiest state, 0 to 1.
        first: the least eta.

    Raises:
        ValueError: if an argument is out of range.

    Source: Kong and Ping, "On Fast Sampling of Diffusion Probabilistic Models", 2021, as used by Fan and Lee,
    "Optimizing DDPM Sampling with Shortcut Fine-Tuning", ICML 2023.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, want at least 1")
    if not 0.0 <= end < 1.0 or not 0.0 < first < 1.0:
        raise ValueError(f"end is {end} and first {first}, want 0 <= end < 1 and 0 < first < 1")

    def cumulative(x: float) -> list[float]:
        return list(
            itertools.accumulate((1.0 - first * (1.0 + i * x) ** 2 for i in range(num_steps)), lambda a, b: a * b)
        )

    low, high = 0.0, 0.95 / (math.sqrt(first) * num_steps)
    if cumulative(high)[-1] < end:
        for _ in range(100):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if cumulative(middle)[-1] > end else (low, middle)
    return cumulative(high)[::-1]


def ddpm_policy(
    schedule: NoiseSchedule,
    num_steps: int | None = None,
    *,
    alpha_bars: Sequence[float] | None = None,
    std: str = "posterior",
) -> PolicySchedule:
    """Ancestral steps between states ``x = sqrt(a) x0 + sqrt(1 - a) eps``, the last of them to the clean image:

        mean = sqrt(a') x0 + sqrt(1 - a' - v) eps,    v = (1 - a')/(1 - a) (1 - a/a')
        eps  = (x - sqrt(a) x0) / sqrt(1 - a)

    x_0 ~ N(0, I) although the first state should still hold some signal. A policy must not start where a is nearly
    0: its first step would multiply x by thousands. About 0.005 to 0.03 is right.

    Args:
        schedule: of the teacher. Its own state may be scaled otherwise (flow, edm). A level that it does not reach is
            asked for at its nearest time.
        num_steps: T, with the levels of `fastdpm_alpha_bars`; None if `alpha_bars` are given.
        alpha_bars: falling noise, so rising numbers inside (0, 1), instead of `num_steps`.
        std: "posterior", ``sqrt(v)``, or "beta", ``sqrt(1 - a/a')``; neither below 1e-3.

    Raises:
        ValueError: if an argument is out of range, or not just one of `num_steps` and `alpha_bars` is given.
    """
    if (num_steps is None) == (alpha_bars is None):
        raise ValueError("ddpm_policy: want num_steps or alpha_bars, one of the two")
    if std not in ("posterior", "beta"):
        raise ValueError(f"ddpm_policy: unknown std {std!r}, want posterior or beta")
    if alpha_bars is None:
        noisiest = torch.tensor(schedule.sampling_times(1), dtype=torch.float64)
        alpha_bars = fastdpm_alpha_bars(num_steps, torch.sigmoid(schedule.log_snr(noisiest)).item())
    if not all(0.0 < a < b for a, b in itertools.pairwise([*alpha_bars, 1.0])):
        raise ValueError(f"ddpm_policy: alpha_bars are {list(alpha_bars)}, want rising numbers inside (0, 1)")
    levels = torch.tensor(alpha_bars, dtype=torch.float64)
    times = schedule.t_of_log_snr(torch.logit(levels))
    scales = schedule.alpha_sigma(times)[0] / levels.sqrt()
    steps = []
    for (a, after), t, scale in zip(
        itertools.pairwise([*alpha_bars, 1.0]), times.tolist(), scales.tolist(), strict=True
    ):
        beta = 1.0 - a / after
        variance = (1.0 - after) / (1.0 - a) * beta
        c_xt = math.sqrt((1.0 - after - variance) / (1.0 - a))
        noise = math.sqrt(variance if std == "posterior" else beta)
        steps.append(PolicyStep(t, scale, math.sqrt(after) - c_xt * math.sqrt(a), c_xt, max(noise, _LEAST_STD)))
    return PolicySchedule(1.0, tuple(steps))


def ve_policy(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    noise_range: tuple[float, float] = (0.002, 80.0),
    rho: float = 7.0,
    stochastic_last: bool = False,
) -> PolicySchedule:
    """Ancestral Euler steps between states ``x = x0 + s eps``; with s' after the step and ``r = s'/s``,

        mean = r^2 x + (1 - r^2) x0,    std = s' sqrt(1 - r^2)

    Args:
        schedule: of the teacher; every one can say what it thinks of a noise level.
        num_steps: T.
        noise_range: least and greatest s; x_0 ~ N(0, greatest^2 I).
        rho: of `karras_levels`. The published recipes take 7 for T = 10 and 4 for T = 4.
        stochastic_last: end at the least s instead of 0, so that the last step adds noise as well.

    Raises:
        ValueError: if an argument is out of range.

    Source: ancestral sampling of EDM teachers in the code of Yoon et al. (see `dxmi`).
    """
    if not 0.0 < noise_range[0] < noise_range[1]:
        raise ValueError(f"ve_policy: noise_range is {noise_range}, want 0 < least < greatest")
    levels = karras_levels(even_places(num_steps + stochastic_last), *noise_range, rho=rho)
    times = schedule.t_of_log_snr(-2.0 * levels.log())
    alphas = schedule.alpha_sigma(times)[0].tolist()
    visited = levels.tolist() + [0.0] * (not stochastic_last)
    steps = []
    for (level, after), t, alpha in zip(itertools.pairwise(visited), times.tolist(), alphas, strict=False):
        ratio = (after / level) ** 2
        steps.append(PolicyStep(t, alpha, 1.0 - ratio, ratio, max(after * math.sqrt(1.0 - ratio), _LEAST_STD)))
    return PolicySchedule(visited[0], tuple(steps))


class DenoiserMean(nn.Module):
    """The mean of each step from a denoiser, whose network is the only submodule: it is what is trained.

    With ``x0 = c scale x + c_pred pred`` (`Denoiser`) the mean is linear in the state and in what the network says of
    it, and both coefficients are known before. Estimates of x0 are not clipped, since that would stop their gradients,
    and not guided: a student follows its labels by itself.

    Args:
        denoiser: the student: network, schedule and prediction, at first those of the teacher.
        schedule: the steps.
    """

    def __init__(self, denoiser: Denoiser, schedule: PolicySchedule):
        super().__init__()
        self.network = denoiser.model
        times, scale, c_x0, c_xt, _ = torch.tensor(
            [dataclasses.astuple(step) for step in schedule.steps], dtype=torch.float64
        ).unbind(1)
        own, c_pred = x0_coefficients(denoiser.prediction, *denoiser.schedule.alpha_sigma(times))
        table = torch.stack((scale, c_xt + c_x0 * own * scale, c_x0 * c_pred), dim=1)
        inputs = denoiser.schedule.time_input(times).to(torch.float32)
        # No buffers: a module in half precision would round the times with its weights.
        self._tables = {torch.device("cpu"): (table, inputs)}

    def forward(self, x: Tensor, index: Tensor, labels: Tensor | None = None) -> Tensor:
        if x.device not in self._tables:
            table, inputs = self._tables[torch.device("cpu")]
            self._tables[x.device] = table.to(x.device), inputs.to(x.device)
        table, inputs = self._tables[x.device]
        rows = table[index].to(x.dtype).view(-1, 3, *(1,) * (x.ndim - 1))
        scale, c_x, c_pred = rows.unbind(1)
        pred = self.network(scale * x, inputs[index], None, labels).to(x.dtype)
        return torch.addcmul(c_x * x, c_pred, pred)


class LogSigmas(nn.Module):
    """``log sigma_t`` of the steps of a policy, called as ``log_sigmas(index) -> [B]``.

    Args:
        stds: sigma_0 to sigma_{T-1} before training.
        num_fixed: the sigmas of the last so many steps stay as they are.

    Attributes:
        log_sigma: ``[T - num_fixed]``, what is trained of the sigmas: a group of its own for the optimizer, with 100
            times the learning rate of the network and no weight decay.

    Raises:
        ValueError: if a std is not positive or `num_fixed` is out of range.
    """

    def __init__(self, stds: Sequence[float], *, num_fixed: int = 1):
        super().__init__()
        name = type(self).__name__
        if not stds or not all(std > 0 for std in stds):
            raise ValueError(f"{name}: stds are {list(stds)}, want positive numbers")
        if not 0 <= num_fixed <= len(stds):
            raise ValueError(f"{name}: num_fixed is {num_fixed}, want 0 to T = {len(stds)}")
        log_sigma = torch.tensor(stds, dtype=torch.float64).log().to(torch.float32)
        self.log_sigma = nn.Parameter(log_sigma[: len(stds) - num_fixed].clone())
        self.register_buffer("fixed_log_sigma", log_sigma[len(stds) - num_fixed :].clone())

    @property
    def num_steps(self) -> int:
        """T."""
        return self.log_sigma.numel() + self.fixed_log_sigma.numel()

    def all_log_sigma(self) -> Tensor:
        """Trained and fixed, ``[T]``."""
        return torch.cat((self.log_sigma, self.fixed_log_sigma))

    def forward(self, index: Tensor) -> Tensor:
        return self.all_log_sigma()[index].float()


class GaussianPolicy(LogSigmas):
    """``pi(x_{t+1} | x_t) = N(mean(x_t, t), sigma_t^2 I)``, called as ``policy(x, index, labels)``.

    Args:
        mean: called as ``mean(x, index, labels)``, of the shape of x.
        stds, num_fixed: as of `LogSigmas`, whose attributes and errors it has.
    """

    def __init__(self, mean: Mean, stds: Sequence[float], *, num_fixed: int = 1):
        super().__init__(stds, num_fixed=num_fixed)
        self.mean = mean

    def forward(self, x: Tensor, index: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return join_policy(self.mean, super().forward)(x, index, labels)


def join_policy(mean: Mean, log_sigmas: Callable[[Tensor], Tensor]) -> Policy:
    """The policy of a mean and of `LogSigmas` that are trained, or kept, apart from each other."""

    def policy(x: Tensor, index: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return mean(x, index, labels).to(x.dtype), log_sigmas(index)

    return policy


def make_policy(denoiser: Denoiser, schedule: PolicySchedule, *, num_fixed: int = 1) -> GaussianPolicy:
    """The policy of a denoiser on these steps; `DenoiserMean` and `GaussianPolicy` say the rest."""
    stds = [step.std for step in schedule.steps]
    return GaussianPolicy(DenoiserMean(denoiser, schedule), stds, num_fixed=num_fixed)


def generate(
    policy: Policy,
    start: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    value: Value | None = None,
    value_guidance: float = 0.0,
) -> Tensor:
    """x_T of the policy; each step then moved down the value, ``x' <- x' - value_guidance sigma_t grad V(x')``.

    Args:
        policy: the sampler.
        start: x_0 ``[B, ...]``.
        noise: ``[T, B, ...]``, standard normal.
        labels: int64 ``[B]``, or None.
        value: V, or None if there is no guidance. Beside an energy of its own, `DxMINetworks.value_of`.
        value_guidance: at least 0, published up to 0.5.

    Returns:
        Of the shape of `start`, without gradient.

    Raises:
        ValueError: if there is guidance but no value, or it is negative, as that of the published code is.

    Source: Yoon et al., 2024, section 5.2. The sign here is the paper's; the published code adds the gradient.
    """
    if not 0.0 <= value_guidance < math.inf:
        raise ValueError(f"generate: value_guidance is {value_guidance}, want 0 or more, which leads to the data")
    if value_guidance and value is None:
        raise ValueError(f"generate: value_guidance is {value_guidance}, but there is no value to follow")
    x = start
    for t in range(noise.shape[0]):
        index = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        with torch.no_grad():
            mean, log_sigma = policy(x, index, labels)
            sigma = log_sigma.exp().to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
            x = torch.addcmul(mean, sigma, noise[t])
        if value_guidance:
            with torch.inference_mode(False), torch.enable_grad():
                at = x.clone().requires_grad_(True)
                (slope,) = torch.autograd.grad(value(at, index + 1).sum(), at)
            x = torch.addcmul(x, sigma, slope, value=-value_guidance)
    return x


@dataclasses.dataclass(frozen=True)
class PolicyGenerator:
    """A policy with its noise, called as a `Generator` is: ``generator(labels, seed=, step=, slots=)`` are x_T.

    Attributes:
        denoiser: the network of the policy.
        policy: the sampler.
        start_std: of x_0.
        num_steps: T.
        token_shape: ``(N, P*P*C)`` of an image.
        value, value_guidance: as of `generate`.
    """

    denoiser: Denoiser
    policy: Policy
    start_std: float
    num_steps: int
    token_shape: tuple[int, int]
    value: Value | None = None
    value_guidance: float = 0.0

    def __call__(self, labels: Tensor | None, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        start, noise = draw_rollout(self.num_steps, self.token_shape, seed=seed, step=step, slots=slots)
        guidance = {"value": self.value, "value_guidance": self.value_guidance}
        return generate(self.policy, self.start_std * start, noise, labels, **guidance)
