"""One iteration of DxMI: its order, its draws, where its gradients go, and the traps of the published code."""

import itertools
import math

import pytest
import torch

from maskdm_fast.distill.dxmi import DxMINetworks, energy_loss, policy_loss, update_loss, value_loss
from maskdm_fast.distill.dxmi_config import DxMIConfig, Update
from maskdm_fast.distill.dxmi_networks import PointValue, TimedMLP
from maskdm_fast.distill.dxmi_policy import GaussianPolicy
from maskdm_fast.distill.dxmi_rollout import Trajectory, adapt_velocity, draw, rollout
from maskdm_fast.distill.networks import frozen

SLOTS = torch.arange(6)


class TimedMean(torch.nn.Module):
    """Some mean with weights."""

    def __init__(self, num_steps):
        super().__init__()
        self.mlp = TimedMLP(2, 2, hidden=8, num_times=num_steps, seed=5)

    def forward(self, x, index, labels=None):
        return x + self.mlp(x, index)


def setup(num_steps=3, *, separate=False, num_fixed=1, **changes):
    config = DxMIConfig(num_steps=num_steps, **changes)
    policy = GaussianPolicy(TimedMean(num_steps), [0.5] * num_steps, num_fixed=num_fixed)
    value = PointValue(2, num_steps + 1, hidden=8, seed=1)
    energy = TimedMLP(2, 1, hidden=8, seed=2)
    networks = DxMINetworks(policy, value, (lambda x: energy(x)[:, 0]) if separate else None)
    draws = draw(config, (2,), seed=0, step=4, slots=SLOTS)
    trajectory = rollout(policy, draws.start, draws.rollout)
    s2 = torch.linspace(0.2, 0.4, num_steps)
    return config, networks, {"trajectory": trajectory, "s2": s2, "draws": draws, "data": draws.start + 1.0}, energy


def test_order_of_the_updates():
    assert DxMIConfig(num_steps=3, num_policy_updates=2).updates() == (
        Update("energy"), Update("value", 2), Update("value", 1), Update("value", 0),
        Update("policy", 0), Update("policy", 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_steps", "want"),
    [
        (10, [0.0113, 0.0294, 0.0718, 0.1497, 0.2311, 0.2311, 0.1497, 0.0718, 0.0294, 0.0113]),
        (4, [0.1497, 0.2311, 0.2311, 0.1497]),
        (5, [0.1497, 0.2311, 0.2311, 0.1497, 0.0718]),  # of an odd number the centre is rounded down
    ],
)
def test_sigmoid_time_cost(num_steps, want):
    costs = DxMIConfig(num_steps=num_steps).time_costs()
    assert costs == pytest.approx(want, abs=5e-5)
    logistic = [1 / (1 + math.exp(-(num_steps // 2 - t))) for t in range(num_steps + 1)]
    for first in range(num_steps):
        assert sum(costs[first:]) == pytest.approx(logistic[first] - logistic[-1], abs=1e-12)
    if num_steps == 10:
        assert sum(costs) == pytest.approx(0.98661, abs=5e-6)


def test_other_time_costs():
    assert DxMIConfig(num_steps=3, time_cost="linear", time_cost_scale=0.05).time_costs() == [0.05] * 3
    assert DxMIConfig(num_steps=3, time_cost="none").time_costs() == [0.0] * 3
    twice = DxMIConfig(num_steps=3, time_cost_scale=2.0).time_costs()
    assert twice == pytest.approx([2 * cost for cost in DxMIConfig(num_steps=3).time_costs()])


def test_the_telescoped_time_cost_is_the_fixed_point_of_the_values():
    """With ``V(x_k) = E(x_T) + S(c - k) - S(c - T)`` and no running cost every value loss is 0."""
    config, num_steps = DxMIConfig(num_steps=10), 10
    states = torch.arange(num_steps + 1.0).view(-1, 1, 1)  # a state that is its own time

    def value(x, index):
        return 0.3 + torch.sigmoid(num_steps // 2 - x[:, 0]) - torch.sigmoid(torch.tensor(num_steps / 2 - num_steps))

    trajectory = Trajectory(states, torch.zeros(num_steps, 1))
    for t in range(num_steps):
        loss, _ = value_loss(config, DxMINetworks(None, value), trajectory, t, torch.ones(num_steps))
        assert loss < 1e-12


def test_draws_do_not_depend_on_how_the_batch_is_cut():
    config = DxMIConfig(num_steps=3, resample=True, num_policy_updates=2)
    whole = draw(config, (2, 2), seed=7, step=3, slots=torch.arange(8))
    part = draw(config, (2, 2), seed=7, step=3, slots=torch.arange(5, 8))
    many = draw(config, (2, 2), seed=7, step=torch.tensor([3, 4]).repeat_interleave(8), slots=torch.arange(8).repeat(2))
    for name in ("start", "rollout", "times", "update", "resample"):
        axis = 0 if name == "start" else 1
        assert torch.equal(getattr(part, name), getattr(whole, name).narrow(axis, 5, 3)), name
        assert torch.equal(getattr(many, name).narrow(axis, 0, 8), getattr(whole, name)), name
        assert not torch.equal(getattr(many, name).narrow(axis, 8, 8), getattr(whole, name)), name
    assert torch.equal(whole.times.sort(dim=0).values, torch.arange(3)[:, None].expand(3, 8))
    floats = (whole.rollout, whole.resample, whole.update)
    for first, second in itertools.combinations(floats, 2):
        assert not torch.equal(first[0], second[0])


def test_rollout_follows_the_policy():
    _, networks, batch, _ = setup()
    x = batch["draws"].start
    for t in range(3):
        mean, log_sigma = networks.policy(x, torch.full((6,), t))
        x = mean + log_sigma.exp()[:, None] * batch["draws"].rollout[t]
        torch.testing.assert_close(batch["trajectory"].states[t + 1], x)
    assert not batch["trajectory"].states.requires_grad
    want = batch["trajectory"].states.diff(dim=0).square().mean(dim=(1, 2))
    torch.testing.assert_close(batch["trajectory"].moves, want)


def test_velocity_adapts_in_the_order_of_time():
    """The published code keeps it in two orders and with three different starts; after a while only the moves count."""
    moves = torch.tensor([4.0, 2.0, 1.0])
    torch.testing.assert_close(adapt_velocity(torch.tensor([1.0, 1.0, 1.0]), moves, 0.9), torch.tensor([1.3, 1.1, 1.0]))


@pytest.mark.parametrize("separate", [False, True])
def test_gradients_stay_in_the_network_of_the_update(separate):
    config, networks, batch, energy = setup(
        separate=separate, num_policy_updates=3, entropy_in_value=0, velocity_in_value=0, resample=True
    )
    own = {"policy": networks.policy, "value": networks.value, "energy": energy if separate else networks.value}
    for update in config.updates():
        others = [
            module for name, module in own.items() if name != update.network and module is not own[update.network]
        ]
        with frozen(*others):
            loss, scalars = update_loss(update, config, networks, **batch)
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own[update.network].parameters())
        for other in others:
            assert all(parameter.grad is None for parameter in other.parameters())
        assert not any(scalar.requires_grad for scalar in scalars.values())
        for module in own.values():
            module.zero_grad()


def test_the_policy_is_improved_over_one_step_only():
    """Its loss knows neither how the state came about nor s^2, and a fixed sigma has no gradient."""
    config, networks, batch, _ = setup(num_policy_updates=3)
    start = batch["draws"].start.requires_grad_(True)
    trajectory = rollout(networks.policy, start, batch["draws"].rollout)
    assert not trajectory.states.requires_grad
    s2 = batch["s2"].requires_grad_(True)
    last = torch.full((6,), 2)
    loss, _ = policy_loss(config, networks, trajectory, last, s2.detach(), batch["draws"].update[0])
    loss.backward()
    assert start.grad is None
    assert networks.policy.log_sigma.shape == (2,)
    assert (networks.policy.log_sigma.grad == 0).all()
    networks.policy.zero_grad()
    policy_loss(config, networks, trajectory, last - 1, s2.detach(), batch["draws"].update[0])[0].backward()
    gradient = networks.policy.log_sigma.grad
    assert gradient[0] == 0
    assert gradient[1] != 0


def test_the_gradient_of_sigma_under_a_flat_value():
    """``-tau_entropy + tau_velocity sigma^2 / s^2``, at rest where ``sigma^2 = s^2 tau_entropy / tau_velocity``."""
    config = DxMIConfig(num_steps=1, tau_entropy=0.1, tau_velocity=0.01)
    x = torch.zeros(2, 4, 3, dtype=torch.float64)
    signs = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], dtype=torch.float64)  # mean 0, square 1

    class Policy(torch.nn.Module):
        def __init__(self, sigma):
            super().__init__()
            self.log_sigma = torch.nn.Parameter(torch.tensor(math.log(sigma), dtype=torch.float64))

        def forward(self, x, index, labels=None):
            return x + 0.3, self.log_sigma.expand(len(x))

    for sigma, s2 in [(0.5, 0.4), (2.0, 0.4), (1.3, 1.3**2 / 10)]:
        policy = Policy(sigma)
        networks = DxMINetworks(policy, lambda x, index: x.sum(1) * 0.0)
        trajectory = Trajectory(x, torch.zeros(1, 4))
        times = torch.zeros(4, dtype=torch.int64)
        loss, _ = policy_loss(config, networks, trajectory, times, torch.tensor([s2], dtype=torch.float64), signs)
        loss.backward()
        want = -0.1 + 0.01 * sigma**2 / s2
        assert policy.log_sigma.grad.item() == pytest.approx(want, abs=1e-12)
    assert want == pytest.approx(0.0, abs=1e-12)


def test_total_tau_is_per_dimension_times_the_dimensions():
    per_dimension = setup(tau_entropy=0.2, tau_velocity=0.06, entropy_in_value=0, velocity_in_value=0)
    total = setup(tau_entropy=0.1, tau_velocity=0.03, tau_convention="total", entropy_in_value=0, velocity_in_value=0)
    for update in per_dimension[0].updates():
        losses = [
            update_loss(update, config, networks, **batch)[0] for config, networks, batch, _ in (per_dimension, total)
        ]
        torch.testing.assert_close(*losses)


def test_value_target_by_hand():
    config, networks, batch, _ = setup(
        entropy_in_value=1, velocity_in_value=2, tau_entropy=0.3, tau_velocity=0.7, time_cost="linear"
    )
    trajectory = batch["trajectory"]
    for t in range(3):
        x, after = trajectory.states[t], trajectory.states[t + 1]
        target = networks.value(after, torch.full((6,), t + 1)) + 1.0
        if t < 2:
            target = target + 0.3 * math.log(2.0)  # -log sigma, sigma = 0.5
        if t < 1:
            target = target + 0.7 * (after - x).square().mean(1) / (2 * batch["s2"][t])
        want = (networks.value(x, torch.full((6,), t)) - target.detach()).square().mean()
        loss, scalars = update_loss(Update("value", t), config, networks, **batch)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(scalars[f"velocity/{t}"], trajectory.moves[t] / (2 * batch["s2"][t]))


def test_resampled_targets_use_new_next_states():
    plain, networks, batch, _ = setup(time_cost="none")
    config, _, _, _ = setup(time_cost="none", resample=True)
    draws = draw(config, (2,), seed=0, step=4, slots=SLOTS)
    x, t = batch["trajectory"].states[1], torch.full((6,), 1)
    mean, log_sigma = networks.policy(x, t)
    after = mean + log_sigma.exp()[:, None] * draws.resample[1]
    want = (networks.value(x, t) - networks.value(after, t + 1)).square().mean()
    loss, _ = update_loss(Update("value", 1), config, networks, **(batch | {"draws": draws}))
    torch.testing.assert_close(loss, want)
    assert update_loss(Update("value", 1), plain, networks, **batch)[0] != loss


def test_a_separate_energy_ends_the_values_at_the_right_end():
    """The published trainer asks it at t = 0."""
    config, networks, batch, energy = setup(separate=True, time_cost="none")
    asked = []
    spy = DxMINetworks(networks.policy, networks.value, lambda x: asked.append(x) or networks.energy(x))
    for t in reversed(range(3)):
        asked.clear()
        value_loss(config, spy, batch["trajectory"], t, batch["s2"])
        assert len(asked) == (t == 2)
    states = batch["trajectory"].states
    want = (networks.value(states[2], torch.full((6,), 2)) - energy(states[3])[:, 0]).square().mean()
    torch.testing.assert_close(value_loss(config, networks, batch["trajectory"], 2, batch["s2"])[0], want)


def test_a_separate_energy_keeps_the_images_of_a_policy_update_apart():
    """The published trainer collapses their values to one number."""
    config, networks, batch, energy = setup(separate=True, tau_entropy=0.0, tau_velocity=0.0)
    times = torch.tensor([2, 0, 1, 2, 2, 0])
    noise = batch["draws"].update[0]
    x = batch["trajectory"].states[times, torch.arange(6)]
    mean, log_sigma = networks.policy(x, times)
    after = mean + log_sigma.exp()[:, None] * noise
    want = torch.where(times == 2, energy(after)[:, 0], networks.value(after, times + 1))
    for image in range(6):
        weight = torch.zeros(6)
        weight[image] = 6.0
        loss, _ = policy_loss(config, networks, batch["trajectory"], times, batch["s2"], noise, weight)
        torch.testing.assert_close(loss, want[image])


def test_the_last_steps_can_go_without_running_costs():
    """In the published code the option of this purpose has no effect."""
    times = torch.tensor([0, 1, 2, 0, 1, 2])
    results = []
    for skip in (0, 1, 3):
        config, networks, batch, _ = setup(skip_last=skip, tau_entropy=0.5, tau_velocity=0.4)
        args = networks, batch["trajectory"], times, batch["s2"], batch["draws"].update[0]
        results.append([policy_loss(config, *args, 6.0 * torch.eye(6)[image])[0].item() for image in range(6)])
    for image, t in enumerate(times.tolist()):
        assert (results[1][image] == pytest.approx(results[0][image])) == (t < 2)
        assert results[2][image] != pytest.approx(results[0][image])


def test_energy_loss_by_hand_and_weights():
    config, networks, batch, _ = setup(gamma=0.5)
    data, samples = batch["data"], batch["trajectory"].states[-1]
    on_data, on_samples = (networks.value(x, torch.full((6,), 3)) for x in (data, samples))
    per_image = on_data - on_samples + 0.5 * (on_data**2 + on_samples**2)
    torch.testing.assert_close(energy_loss(config, networks, data, samples)[0], per_image.mean())
    weight = torch.tensor([1.0, 0, 2, 0, 0, 0])
    torch.testing.assert_close(energy_loss(config, networks, data, samples, weight)[0], (weight * per_image).mean())


def test_losses_of_half_precision_values_are_float32():
    config, networks, batch, _ = setup(separate=True, num_policy_updates=3)
    half = DxMINetworks(
        networks.policy, lambda x, index: networks.value(x, index).bfloat16(), lambda x: networks.energy(x).bfloat16()
    )
    for update in config.updates():
        loss, _ = update_loss(update, config, half, **batch)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, update_loss(update, config, networks, **batch)[0], rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 0},
        {"tau_entropy": -0.1},
        {"gamma": math.nan},
        {"tau_convention": "mean"},
        {"time_cost": "quadratic"},
        {"skip_last": 4},
        {"entropy_in_value": -1},
        {"avr_decay": 1.0},
        {"num_policy_updates": 4},
    ],
)
def test_wrong_configurations(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        DxMIConfig(**({"num_steps": 3} | changes))
