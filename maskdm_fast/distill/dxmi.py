"""DxMI: a sampler of few steps and an energy that train each other (maximum-entropy inverse reinforcement learning).

Time runs as in control: x_0 is noise, x_T the sample. The policy ``pi(x_{t+1} | x_t) = N(mean(x_t, t), sigma_t^2 I)``
minimises, and the value functions predict,

    E_pi[ E(x_T) + sum_t c_t ],    c_t = tau_entropy log pi(x_{t+1} | x_t) + tau_velocity |x_{t+1} - x_t|^2 / (2 s_t^2)

while the energy E tells data from samples. ``log pi`` enters by its mean, ``-log sigma_t`` per dimension; its constant
``-ln(2 pi e) / 2`` is left out everywhere. Costs are means over the D dimensions of x ("per-dimension": tau is D times
the tau of the paper) or sums ("total").

One iteration, with one optimizer step per update, in the order of `DxMIConfig.updates`:

    trajectory = rollout(policy, draws, labels)            # without gradient, from the policy as it is
    s2 = adapt_velocity(s2, trajectory.moves, avr_decay)
    energy; value at t = T-1, ..., 0; policy, once or more

Nothing is propagated through more than one step of the policy: every state that a loss starts from is detached.

A policy is called as ``policy(x, index, labels) -> (mean, log_sigma)`` and a value as ``value(x, index) -> [B]``, with
``index`` int64 ``[B]``, 0..T-1 and 0..T. Letters: B images, D values of one x, T steps.

Source: Yoon et al., "Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models",
NeurIPS 2024.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.random import Stream

Policy = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Value = Callable[[Tensor, Tensor], Tensor]
Scalars = dict[str, Tensor]
TIME_COSTS = ("sigmoid", "linear", "none")
TAU_CONVENTIONS = ("per-dimension", "total")


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer step: of which network, and the time (of a value) or the number (of a policy update)."""

    network: Literal["energy", "value", "policy"]
    index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DxMIConfig:
    """What one iteration of DxMI computes. The defaults are those of the paper for images.

    Args:
        num_steps: T, steps of the policy.
        tau_entropy: weight of the entropy, 0 or more.
        tau_velocity: weight of the squared moves, 0 or more.
        tau_convention: "per-dimension", what the published code computes, or "total", what the paper writes: the same
            with D times the tau.
        skip_last: how many of the last steps of the policy have no running cost in its own loss.
        entropy_in_value: the value targets hold the entropy of all but the last so many steps; None: of no step.
        velocity_in_value: likewise for the moves.
        time_cost: what each step costs in the value targets. sigmoid: ``S(T//2 - t) - S(T//2 - t - 1)`` with the
            logistic function S; linear: 1; none: 0.
        time_cost_scale: multiplies the time cost. The paper's linear cost is 0.05 per step.
        gamma: weight of the squared energies, which bounds them: ``|E| <= 1 / (2 gamma)`` at the optimum.
        avr_decay: of the running mean of the squared moves, `adapt_velocity`.
        resample: value targets and the policy's own states: draw x_{t+1} anew instead of taking that of the rollout.
        num_policy_updates: policy steps in an iteration, 1 to T; each takes one transition of every trajectory, and no
            transition is taken twice.

    Raises:
        ValueError: if a value is out of range.
    """

    num_steps: int
    tau_entropy: float = 0.1
    tau_velocity: float = 0.01
    tau_convention: str = "per-dimension"
    skip_last: int = 0
    entropy_in_value: int | None = None
    velocity_in_value: int | None = None
    time_cost: str = "sigmoid"
    time_cost_scale: float = 1.0
    gamma: float = 1.0
    avr_decay: float = 0.99
    resample: bool = False
    num_policy_updates: int = 1

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, want at least 1")
        for name in ("tau_entropy", "tau_velocity", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, want 0 or more")
        for name, known in (("tau_convention", TAU_CONVENTIONS), ("time_cost", TIME_COSTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, want one of {', '.join(known)}")
        for name in ("skip_last", "entropy_in_value", "velocity_in_value"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= self.num_steps:
                raise ValueError(f"{name} is {value}, want 0 to num_steps {self.num_steps}")
        if not 0 <= self.avr_decay < 1:
            raise ValueError(f"avr_decay is {self.avr_decay}, want 0 <= avr_decay < 1")
        if not 1 <= self.num_policy_updates <= self.num_steps:
            raise ValueError(f"num_policy_updates is {self.num_policy_updates}, want 1 to num_steps {self.num_steps}")

    def updates(self) -> tuple[Update, ...]:
        """The optimizer steps of one iteration, in order: energy, values backward in time, policy."""
        values = tuple(Update("value", t) for t in reversed(range(self.num_steps)))
        return (Update("energy"), *values, *(Update("policy", k) for k in range(self.num_policy_updates)))

    def time_costs(self) -> list[float]:
        """R(t) for t = 0..T-1."""
        if self.time_cost == "none":
            return [0.0] * self.num_steps
        if self.time_cost == "linear":
            return [self.time_cost_scale] * self.num_steps
        ramp = [1.0 / (1.0 + math.exp(t - self.num_steps // 2)) for t in range(self.num_steps + 1)]
        return [self.time_cost_scale * (ramp[t] - ramp[t + 1]) for t in range(self.num_steps)]


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one iteration.

    Attributes:
        start: ``[B, ...]``, standard normal, of which x_0 is made.
        rollout: ``[T, B, ...]``, standard normal, the noise of each step.
        times: int64 ``[T, B]``: row k holds the time of the transition that policy update k takes of each trajectory;
            every column is a permutation of 0..T-1.
        update: ``[num_policy_updates, B, ...]``, standard normal, the noise of the policy updates.
        resample: ``[T, B, ...]``, standard normal; None unless values are resampled.
    """

    start: Tensor
    rollout: Tensor
    times: Tensor
    update: Tensor
    resample: Tensor | None


def draw(config: DxMIConfig, shape: tuple[int, ...], *, seed: int, step: int | Tensor, slots: Tensor) -> Draws:
    """The numbers of one iteration: functions of (seed, step, slot), so that a batch may be cut anywhere.

    Args:
        config: how many there are.
        shape: of one x.
        seed: run seed.
        step: iteration; a tensor that broadcasts with `slots` draws for many at once.
        slots: int64 ``[B]``, places in the global batch.
    """
    where = {"seed": seed, "step": step, "slots": slots}
    size, num_steps = math.prod(shape), config.num_steps

    def normal(num: int, stream: Stream) -> Tensor:
        return random.normal(num * size, stream=stream, **where).unflatten(1, (num, *shape)).transpose(0, 1)

    order = random.bits(num_steps, stream=Stream.TRANSITION_ORDER, **where)
    return Draws(
        start=normal(1, Stream.GENERATOR_NOISE)[0],
        rollout=normal(num_steps, Stream.POLICY_NOISE),
        times=torch.argsort(order, dim=1, stable=True).transpose(0, 1),
        update=normal(config.num_policy_updates, Stream.POLICY_UPDATE),
        resample=normal(num_steps, Stream.POLICY_RESAMPLE) if config.resample else None,
    )


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What the policy did: no gradient leads into it.

    Attributes:
        states: ``[T + 1, B, ...]``, x_0 to x_T.
        log_sigma: ``[T, B]``.
        labels: int64 ``[B]``, or None.
    """

    states: Tensor
    log_sigma: Tensor
    labels: Tensor | None = None

    @property
    def moves(self) -> Tensor:
        """``|x_{t+1} - x_t|^2 / D``, the mean over images, ``[T]``: what `adapt_velocity` averages."""
        return self.states.diff(dim=0).square().flatten(1).mean(dim=1)


def act(policy: Policy, x: Tensor, index: Tensor, labels: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One step: ``(mean + sigma noise, log_sigma)``, with gradient to the policy."""
    mean, log_sigma = policy(x, index, labels)
    return torch.addcmul(mean, _like(log_sigma.exp(), mean), noise), log_sigma


@torch.no_grad()
def rollout(policy: Policy, start: Tensor, noise: Tensor, labels: Tensor | None = None) -> Trajectory:
    """Run the policy from ``x_0 = start`` with the `noise` ``[T, B, ...]`` of its steps."""
    states, log_sigmas = [start], []
    for t in range(noise.shape[0]):
        x, log_sigma = act(policy, states[-1], _full(t, start), labels, noise[t])
        states.append(x)
        log_sigmas.append(log_sigma)
    return Trajectory(torch.stack(states), torch.stack(log_sigmas), labels)


def adapt_velocity(s2: Tensor, moves: Tensor, decay: float) -> Tensor:
    """Adaptive velocity regularisation: ``s_t^2 <- decay s_t^2 + (1 - decay) E|x_{t+1} - x_t|^2 / D``, ``[T]``.

    The mean square move is the s_t^2 that makes the bound on the divergence tightest. Once it is reached, the velocity
    cost per dimension, ``|x_{t+1} - x_t|^2 / (2 D s_t^2)``, is 1/2 at every step.
    """
    return torch.lerp(moves.to(s2.dtype), s2, decay)


@dataclasses.dataclass(frozen=True)
class DxMINetworks:
    """The three networks as they are called.

    Attributes:
        policy: the sampler.
        value: V(x, t); where there is no energy of its own, V(., T) is the energy.
        energy: E(x), called as ``energy(x)``, or None.
    """

    policy: Policy
    value: Value
    energy: Callable[[Tensor], Tensor] | None = None

    def energy_of(self, x: Tensor, num_steps: int) -> Tensor:
        """E(x) ``[B]``."""
        return self.value(x, _full(num_steps, x)) if self.energy is None else self.energy(x)

    def value_of(self, x: Tensor, index: Tensor, num_steps: int) -> Tensor:
        """``V^index(x)`` ``[B]`` with ``V^T = E``, for times that may differ between images."""
        value = self.value(x, index)
        return value if self.energy is None else torch.where(index == num_steps, self.energy(x), value)


def update_loss(
    update: Update,
    config: DxMIConfig,
    networks: DxMINetworks,
    *,
    data: Tensor,
    trajectory: Trajectory,
    s2: Tensor,
    draws: Draws,
    weight: Tensor | None = None,
) -> tuple[Tensor, Scalars]:
    """The loss of one of `DxMIConfig.updates`, with the networks as they are now.

    Args:
        update: which.
        config: the method.
        networks: policy, value and energy. In a policy update the others pass gradients on to x and need none
            themselves: `frozen`.
        data: ``[B, ...]``, real images, of the shape of a state.
        trajectory: of this iteration.
        s2: ``[T]``, float32, the s_t^2 of `adapt_velocity`.
        draws: of this iteration.
        weight: ``[B]``, or None for 1; losses are ``mean(weight * loss per image)``.

    Returns:
        The loss with gradient to the network of `update`, and detached scalars to log.
    """
    if update.network == "energy":
        return energy_loss(config, networks, data, trajectory.states[-1], weight)
    if update.network == "value":
        return value_loss(config, networks, trajectory, update.index, s2, draws.resample, weight)
    return policy_loss(config, networks, trajectory, draws.times[update.index], s2, draws.update[update.index], weight)


def energy_loss(
    config: DxMIConfig, networks: DxMINetworks, data: Tensor, samples: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Scalars]:
    """``mean E(data) - mean E(samples) + gamma (mean E(data)^2 + mean E(samples)^2)``.

    Its optimum is ``E = (pi - p) / (2 gamma (p + pi))`` with the densities p of the data and pi of the samples, and its
    least value ``-1/(4 gamma) * integral of (p - pi)^2 / (p + pi)``, between -1/(2 gamma) and 0.

    Returns:
        The loss, and ``energy_data`` and ``energy_samples``.
    """
    both = torch.cat((data, samples)).detach()
    on_data, on_samples = networks.energy_of(both, config.num_steps).chunk(2)
    per_image = on_data - on_samples + config.gamma * (on_data.square() + on_samples.square())
    scalars = {"energy_data": on_data.detach().mean(), "energy_samples": on_samples.detach().mean()}
    return _mean(per_image, weight), scalars


def value_loss(
    config: DxMIConfig,
    networks: DxMINetworks,
    trajectory: Trajectory,
    t: int,
    s2: Tensor,
    resample: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Scalars]:
    """``(V^t(x_t) - target)^2`` with ``target = V^{t+1}(x_{t+1}) + R(t) + running costs``, which has no gradient.

    Args:
        config: which costs there are.
        networks: policy (for resampling), value and energy.
        trajectory: of this iteration.
        t: time, 0..T-1.
        s2: ``[T]``.
        resample: ``[T, B, ...]``, noise to draw x_{t+1} anew; must be given if the configuration resamples.
        weight: ``[B]``, or None.

    Returns:
        The loss, and ``value/t`` and ``velocity/t``, the velocity cost per dimension without its tau (1/2 at rest).
    """
    x, num_steps = trajectory.states[t], config.num_steps
    index = _full(t, x)
    with torch.no_grad():
        after, log_sigma = trajectory.states[t + 1], trajectory.log_sigma[t]
        if config.resample:
            after, log_sigma = act(networks.policy, x, index, trajectory.labels, resample[t])
        entropy, velocity = _running_costs(config, x, after, log_sigma, s2[t])
        last = t + 1 == num_steps
        target = networks.energy_of(after, num_steps) if last else networks.value(after, index + 1)
        target = target + config.time_costs()[t]
        for cost, skipped in ((entropy, config.entropy_in_value), (velocity, config.velocity_in_value)):
            if skipped is not None and t < num_steps - skipped:
                target = target + cost
        half_moves = _mean_square(after - x).mean() / (2.0 * s2[t])
    value = networks.value(x, index)
    scalars = {f"value/{t}": value.detach().mean(), f"velocity/{t}": half_moves}
    return _mean((value - target).square(), weight), scalars


def policy_loss(
    config: DxMIConfig,
    networks: DxMINetworks,
    trajectory: Trajectory,
    times: Tensor,
    s2: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
) -> tuple[Tensor, Scalars]:
    """``V^{t+1}(x') - tau_entropy log sigma_t + tau_velocity |x' - x_t|^2 / (2 s_t^2)``, ``x' = mean + sigma noise``.

    Args:
        config: the weights, and which steps have running costs.
        networks: policy, value and energy.
        trajectory: of this iteration, whose states are where the steps start.
        times: int64 ``[B]``, 0..T-1, the time t of each image.
        s2: ``[T]``.
        noise: ``[B, ...]``.
        weight: ``[B]``, or None.

    Returns:
        The loss, and ``value_after``, the mean of ``V^{t+1}(x')``.
    """
    pick = times.view(1, -1, *(1,) * (trajectory.states.ndim - 2)).expand(1, *trajectory.states.shape[1:])
    x = trajectory.states.gather(0, pick)[0]
    after, log_sigma = act(networks.policy, x, times, trajectory.labels, noise)
    value = networks.value_of(after, times + 1, config.num_steps)
    entropy, velocity = _running_costs(config, x, after, log_sigma, s2[times])
    running = torch.where(times < config.num_steps - config.skip_last, entropy + velocity, 0.0)
    return _mean(value + running, weight), {"value_after": value.detach().mean()}


def _running_costs(
    config: DxMIConfig, x: Tensor, after: Tensor, log_sigma: Tensor, s2: Tensor
) -> tuple[Tensor, Tensor]:
    """``(tau_entropy (-log sigma), tau_velocity |x' - x|^2 / (2 D s^2))``, each ``[B]``, times D if tau is total."""
    scale = x[0].numel() if config.tau_convention == "total" else 1
    velocity = _mean_square(after - x) / (2.0 * s2)
    return -scale * config.tau_entropy * log_sigma, scale * config.tau_velocity * velocity


def _mean(per_image: Tensor, weight: Tensor | None) -> Tensor:
    return (per_image if weight is None else per_image * weight).mean()


def _mean_square(x: Tensor) -> Tensor:
    """Over all but the first axis."""
    return x.square().flatten(1).mean(dim=1)


def _full(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)


def _like(scale: Tensor, x: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]`` in the dtype of `x`."""
    return scale.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
