"""DxMI: a sampler of few steps and an energy that train each other (maximum-entropy inverse reinforcement learning).

Time runs as in control: x_0 is noise, x_T the sample. The policy ``pi(x_{t+1} | x_t) = N(mean(x_t, t), sigma_t^2 I)``
minimises, and the value functions predict,

    E_pi[ E(x_T) + sum_t c_t ],    c_t = tau_entropy log pi(x_{t+1} | x_t) + tau_velocity |x_{t+1} - x_t|^2 / (2 s_t^2)

while the energy E tells data from samples. ``log pi`` enters by its mean, ``-log sigma_t`` per dimension; its constant
``-ln(2 pi e) / 2`` is left out everywhere. Costs are means over the D dimensions of x ("per-dimension": tau is D times
the tau of the paper) or sums ("total").

One iteration, with one optimizer step per update, in the order of `DxMIConfig.updates`:

    draws = draw(config, shape, seed=seed, step=step, slots=slots)
    trajectory = rollout(policy, start_std * draws.start, draws.rollout, labels)
    s2 = adapt_velocity(s2, trajectory.moves, config.avr_decay)
    for update in config.updates(): update_loss(update, ...), backward, optimizer step

Nothing is propagated through more than one step of the policy: every state that a loss starts from is detached.

A policy is called as ``policy(x, index, labels) -> (mean, log_sigma)`` and a value as ``value(x, index) -> [B]``, with
``index`` int64 ``[B]``, 0..T-1 and 0..T. Letters: B images, D values of one x, T steps.

Source: Yoon et al., "Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models",
NeurIPS 2024.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from maskdm_fast.distill.dxmi_config import DxMIConfig, Update
from maskdm_fast.distill.dxmi_rollout import Draws, Policy, Trajectory, Value, act, full_index

Scalars = dict[str, Tensor]


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
        return self.value_at(x, full_index(num_steps, x)) if self.energy is None else _wide(self.energy(x))

    def value_at(self, x: Tensor, index: Tensor) -> Tensor:
        """V(x, t) of the value network ``[B]``, at least float32: costs are too small for half precision."""
        return _wide(self.value(x, index))

    def value_of(self, x: Tensor, index: Tensor, num_steps: int) -> Tensor:
        """``V^index(x)`` ``[B]`` with ``V^T = E``, for times that may differ between images."""
        value = self.value_at(x, index)
        return value if self.energy is None else torch.where(index == num_steps, _wide(self.energy(x)), value)


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
    index = full_index(t, x)
    with torch.no_grad():
        after, log_sigma = trajectory.states[t + 1], trajectory.log_sigma[t]
        if config.resample:
            after, log_sigma = act(networks.policy, x, index, trajectory.labels, resample[t])
        entropy, velocity = _running_costs(config, x, after, log_sigma, s2[t])
        last = t + 1 == num_steps
        target = networks.energy_of(after, num_steps) if last else networks.value_at(after, index + 1)
        target = target + config.time_costs()[t]
        for cost, skipped in ((entropy, config.entropy_in_value), (velocity, config.velocity_in_value)):
            if skipped is not None and t < num_steps - skipped:
                target = target + cost
        half_moves = _mean_square(after - x).mean() / (2.0 * s2[t])
    value = networks.value_at(x, index)
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


def _wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
