"""Trajectories of a policy for `dxmi`, the numbers that they are drawn with, and how far their steps go."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.distill.dxmi_config import DxMIConfig
from maskdm_fast.random import Stream

Policy = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Value = Callable[[Tensor, Tensor], Tensor]
"""Called as ``policy(x, index, labels) -> (mean, log_sigma)`` and ``value(x, index) -> [B]``."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one iteration.

    Attributes:
        start: ``[B, ...]``, standard normal; x_0 is this times `PolicySchedule.start_std`, or `latent_starts`.
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
    num_steps = config.num_steps
    start, noise = draw_rollout(num_steps, shape, **where)
    order = random.bits(num_steps, stream=Stream.TRANSITION_ORDER, **where)
    return Draws(
        start=start,
        rollout=noise,
        times=torch.argsort(order, dim=1, stable=True).transpose(0, 1),
        update=_normal(config.num_policy_updates, shape, Stream.POLICY_UPDATE, **where),
        resample=_normal(num_steps, shape, Stream.POLICY_RESAMPLE, **where) if config.resample else None,
    )


def draw_rollout(
    num_steps: int, shape: tuple[int, ...], *, seed: int, step: int | Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """``start`` and ``rollout`` of `Draws`, which are all that sampling takes; arguments as of `draw`."""
    where = {"seed": seed, "step": step, "slots": slots}
    start = _normal(1, shape, Stream.GENERATOR_NOISE, **where)[0]
    return start, _normal(num_steps, shape, Stream.POLICY_NOISE, **where)


def _normal(num: int, shape: tuple[int, ...], stream: Stream, *, slots: Tensor, **where: int | Tensor) -> Tensor:
    """``[num, B, ...]``."""
    draws = random.normal(num * math.prod(shape), stream=stream, slots=slots, **where)
    return draws.unflatten(1, (num, *shape)).transpose(0, 1)


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
        x, log_sigma = act(policy, states[-1], full_index(t, start), labels, noise[t])
        states.append(x)
        log_sigmas.append(log_sigma)
    return Trajectory(torch.stack(states), torch.stack(log_sigmas), labels)


def adapt_velocity(s2: Tensor, moves: Tensor, decay: float) -> Tensor:
    """Adaptive velocity regularisation: ``s_t^2 <- decay s_t^2 + (1 - decay) E|x_{t+1} - x_t|^2 / D``, ``[T]``.

    The mean square move is the s_t^2 that makes the bound on the divergence tightest. Once it is reached, the velocity
    cost per dimension, ``|x_{t+1} - x_t|^2 / (2 D s_t^2)``, is 1/2 at every step.

    Args:
        s2: ``[T]``, float32, s_t^2 so far, in the order of time; at first the squared sigmas of the policy.
        moves: ``[T]``, `Trajectory.moves`, the mean over the whole batch: of all processes and micro-batches.
        decay: 0 to 1.
    """
    return torch.lerp(moves.to(s2.dtype), s2, decay)


def full_index(t: int, x: Tensor) -> Tensor:
    """The time t for every image of `x`, int64 ``[B]``."""
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)


def _like(scale: Tensor, x: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]`` in the dtype of `x`."""
    return scale.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
