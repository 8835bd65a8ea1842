"""What DxMI computes, held to closed forms: linear-Gaussian control, the soft Bellman equation, and the bound."""

import itertools
import math

import pytest
import torch

from maskdm_fast.distill.dxmi import DxMINetworks, energy_loss, policy_loss, value_loss
from maskdm_fast.distill.dxmi_config import DxMIConfig
from maskdm_fast.distill.dxmi_rollout import Trajectory, adapt_velocity, draw, rollout

DIM, NUM_STEPS, TAU = 2, 3, 0.3
CURVATURE, CENTRE = 1.7, torch.tensor([0.8, -0.5], dtype=torch.float64)  # E(x) = k/2 |x - m|^2
S2 = torch.tensor([0.6, 0.35, 0.2], dtype=torch.float64)
CONSTANT = TAU * DIM / 2 * (math.log(2 * math.pi) + 1)  # of the entropy of one step, which the library leaves out
CONFIG = DxMIConfig(
    num_steps=NUM_STEPS,
    tau_entropy=TAU,
    tau_velocity=TAU,
    tau_convention="total",
    entropy_in_value=0,
    velocity_in_value=0,
    time_cost="none",
)


def energy(x):
    return 0.5 * CURVATURE * (x - CENTRE).square().sum(-1)


class LinearPolicy(torch.nn.Module):
    """``N(a_t x + b_t, sigma_t^2 I)``."""

    def __init__(self, a, b, log_sigma):
        super().__init__()
        self.a, self.b, self.log_sigma = (
            torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float64).clone()) for value in (a, b, log_sigma)
        )

    def forward(self, x, index, labels=None):
        return self.a[index, None] * x + self.b[index], self.log_sigma[index]


def some_policy():
    return LinearPolicy([0.9, 0.7, 0.8], [[0.1, 0.2], [-0.3, 0.1], [0.2, -0.1]], [-0.5, -0.8, -1.1])


class QuadraticValue:
    """``V^t = K_t/2 |x|^2 - h_t x + c_t``, rows (K, h, c) of `theta` for each t."""

    def __init__(self, theta):
        self.theta = theta

    def __call__(self, x, index):
        k, h, c = self.theta[index].split((1, DIM, 1), dim=1)
        return (0.5 * k * x.square() - h * x).sum(1) + c[:, 0]


def closed_form(policy):
    """Rows (K, h, c) of the value of `policy`, t = 0..T."""
    k, h, c = (
        torch.full((), CURVATURE, dtype=torch.float64),
        CURVATURE * CENTRE,
        0.5 * CURVATURE * CENTRE.square().sum(),
    )
    rows = [torch.cat((k.view(1), h, c.view(1)))]
    for t in reversed(range(NUM_STEPS)):
        a, b, var = policy.a[t], policy.b[t], (2 * policy.log_sigma[t]).exp()
        pull, spread = TAU / S2[t], b.square().sum() + DIM * var
        c = c + 0.5 * k * spread - h @ b - TAU * DIM / 2 * (torch.log(2 * math.pi * var) + 1) + 0.5 * pull * spread
        h = a * h - a * k * b - pull * (a - 1) * b
        k = a**2 * k + pull * (a - 1) ** 2
        rows.insert(0, torch.cat((k.view(1), h, c.view(1))))
    return torch.stack(rows).detach()


def without_constants(theta):
    """The library's value: that of `closed_form` plus the constant of every step still to come."""
    theta = theta.clone()
    theta[:, -1] += CONSTANT * torch.arange(NUM_STEPS, -1, -1, dtype=torch.float64)
    return theta


def quadrature(dim):
    """Noise and weights whose means are those of N(0, I) for polynomials up to degree 5, the weights with mean 1."""
    nodes, weights = [-math.sqrt(3.0), 0.0, math.sqrt(3.0)], [1 / 6, 2 / 3, 1 / 6]
    noise = torch.tensor(list(itertools.product(nodes, repeat=dim)), dtype=torch.float64)
    weight = torch.tensor([math.prod(row) for row in itertools.product(weights, repeat=dim)], dtype=torch.float64)
    return noise, weight * len(weight)


def states():
    """Points with every noise of the quadrature: ``(x, noise, weight)``."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    noise, weight = quadrature(DIM)
    x = points.repeat_interleave(len(noise), 0)
    return x, noise.repeat(len(points), 1), weight.repeat(len(points))


def one_step(policy, t, x, noise):
    """A trajectory of which only the step at t is there."""
    index = torch.full((len(x),), t)
    mean, log_sigma = policy(x, index)
    after = (mean + log_sigma.exp()[:, None] * noise).detach()
    both = torch.zeros(NUM_STEPS + 1, *x.shape, dtype=torch.float64)
    both[t], both[t + 1] = x, after
    return Trajectory(both, log_sigma.detach().expand(NUM_STEPS, -1))


def regress(policy):
    """Fit the quadratic values by the TD loss, backward in time, each to its exact minimum."""
    x, noise, weight = states()
    theta = torch.zeros(NUM_STEPS + 1, DIM + 2, dtype=torch.float64)
    for t in reversed(range(NUM_STEPS)):
        trajectory = one_step(policy, t, x, noise)

        def loss(row, t=t, trajectory=trajectory):
            rows = theta.clone()
            rows[t] = row
            networks = DxMINetworks(policy, QuadraticValue(rows), energy)
            return value_loss(CONFIG, networks, trajectory, t, S2, weight=weight)[0]

        zero = torch.zeros(DIM + 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(zero), zero)
        hessian = torch.autograd.functional.hessian(loss, zero.detach())
        theta[t] = torch.linalg.solve(hessian, -slope)
    return theta[:-1]


def test_policy_evaluation_finds_the_value():
    policy = some_policy()
    want = without_constants(closed_form(policy))[:-1]
    torch.testing.assert_close(regress(policy), want, rtol=1e-9, atol=1e-9)


def test_rollouts_cost_what_the_value_says():
    """The Monte Carlo mean of energy and running costs over whole trajectories."""
    policy, num = some_policy(), 40_000
    draws = draw(CONFIG, (DIM,), seed=3, step=0, slots=torch.arange(num))
    trajectory = rollout(policy, draws.start.double(), draws.rollout.double())
    cost = energy(trajectory.states[-1])
    for t in range(NUM_STEPS):
        move = (trajectory.states[t + 1] - trajectory.states[t]).square().sum(1)
        cost = cost - TAU * DIM * policy.log_sigma[t].detach() + TAU * move / (2 * S2[t])
    theta = without_constants(closed_form(policy))
    want = QuadraticValue(theta)(trajectory.states[0], torch.zeros(num, dtype=torch.int64))
    difference = cost - want
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(num)


def optimum():
    """The optimal policy, and rows (K, h, c) of its value."""
    rows, a, b, log_sigma = [], [], [], []
    k, c = torch.tensor(CURVATURE, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in reversed(range(NUM_STEPS + 1)):
        if t < NUM_STEPS:
            var = TAU / (k + TAU / S2[t])
            keep = TAU / S2[t] / (k + TAU / S2[t])
            a.insert(0, keep), b.insert(0, (1 - keep) * CENTRE), log_sigma.insert(0, 0.5 * var.log())
            k, c = 1 / (1 / k + S2[t] / TAU), c - TAU * DIM / 2 * torch.log(2 * math.pi * var)
        rows.insert(0, torch.cat((k.view(1), k * CENTRE, (0.5 * k * CENTRE.square().sum() + c).view(1))))
    return LinearPolicy(torch.stack(a), torch.stack(b), torch.stack(log_sigma)), torch.stack(rows)


def improvement_loss(policy, theta, t):
    x, noise, weight = states()
    trajectory = Trajectory(x.expand(NUM_STEPS + 1, -1, -1), torch.zeros(NUM_STEPS, len(x), dtype=torch.float64))
    networks = DxMINetworks(policy, QuadraticValue(theta), energy)
    return policy_loss(CONFIG, networks, trajectory, torch.full((len(x),), t), S2, noise, weight)[0]


def test_the_optimal_policy_is_stationary():
    policy, theta = optimum()
    torch.testing.assert_close(closed_form(policy), theta, rtol=1e-12, atol=1e-12)
    for t in range(NUM_STEPS):
        gradients = torch.autograd.grad(improvement_loss(policy, without_constants(theta), t), policy.parameters())
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
        other = some_policy()
        (slope,) = torch.autograd.grad(improvement_loss(other, theta, t), [other.a])
        assert slope.abs().max() > 1e-2


def test_sweeps_of_evaluation_and_improvement_fall_to_the_optimum():
    policy, (_, best) = some_policy(), optimum()
    start = quadrature(DIM)

    def cost(theta):
        value = QuadraticValue(theta)(start[0], torch.zeros(len(start[0]), dtype=torch.int64))
        return (value * start[1]).mean().item()

    costs = [cost(closed_form(policy))]
    for _ in range(NUM_STEPS):
        theta = regress(policy)  # rows 0..T-1; the energy stands at T
        theta = torch.cat((theta, torch.zeros(1, DIM + 2, dtype=torch.float64)))
        optimizer = torch.optim.LBFGS(
            policy.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure(theta=theta, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(improvement_loss(policy, theta, t) for t in range(NUM_STEPS))
            loss.backward()
            return loss

        optimizer.step(closure)
        costs.append(cost(closed_form(policy)))
    assert all(after < before for before, after in itertools.pairwise(costs[:3]))
    assert costs[-1] <= costs[-2] + 1e-9
    assert costs[-1] == pytest.approx(cost(best), abs=1e-8)


def mixture_value(x, smoothing, tau):
    """-tau ln of a mixture of two Gaussians on the line, smoothed by N(0, smoothing)."""
    means, var = torch.tensor([-1.2, 1.0], dtype=torch.float64), 0.15
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    spread = torch.as_tensor(var + smoothing, dtype=torch.float64)
    logits = weights.log() - (x[..., None] - means).square() / (2 * spread[..., None])
    return -tau * (torch.logsumexp(logits, -1) - 0.5 * torch.log(2 * math.pi * spread))


def soft_value(x, t):
    """``-tau ln E exp(-E/tau)`` over the Gaussian steps to come, minus ``tau/2 sum ln(2 pi s^2)``."""
    after = torch.stack([S2[i:].sum() for i in range(NUM_STEPS + 1)])[t]
    logs = torch.stack([torch.log(2 * math.pi * S2[i:]).sum() for i in range(NUM_STEPS + 1)])[t]
    return mixture_value(x, after, TAU) - 0.5 * TAU * logs


def test_soft_bellman_equation_of_a_bimodal_energy():
    grid = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    width = grid[1] - grid[0]
    for t in range(NUM_STEPS):
        exponent = -soft_value(grid, t + 1)[None, :] / TAU - (grid[:, None] - grid).square() / (2 * S2[t])
        backup = -TAU * (torch.logsumexp(exponent, 1) + width.log())
        inside = grid.abs() < 3
        torch.testing.assert_close(backup[inside], soft_value(grid, t)[inside], rtol=0, atol=1e-10)


def test_no_gaussian_step_beats_the_soft_value():
    """Given the optimal value of the next time, the loss of any Gaussian step is at least the optimal value of this."""
    nodes = torch.linspace(-8, 8, 801, dtype=torch.float64)
    weight = torch.exp(-nodes.square() / 2)
    weight = weight / weight.mean()
    config = DxMIConfig(num_steps=NUM_STEPS, tau_entropy=TAU, tau_velocity=TAU, time_cost="none")
    networks = {"value": lambda x, index: soft_value(x[:, 0], index)}
    gaps = []
    for t, (x, mean, sigma) in itertools.product(
        range(NUM_STEPS), itertools.product([-1.5, 0.0, 0.7], [-1.0, 0.0, 1.0], [0.1, 0.4, 1.0])
    ):
        step = LinearPolicy([0.0] * NUM_STEPS, [[mean]] * NUM_STEPS, [math.log(sigma)] * NUM_STEPS)
        at = torch.full((NUM_STEPS + 1, len(nodes), 1), x, dtype=torch.float64)
        trajectory = Trajectory(at, torch.zeros(NUM_STEPS, len(nodes), dtype=torch.float64))
        times = torch.full((len(nodes),), t)
        loss, _ = policy_loss(config, DxMINetworks(step, **networks), trajectory, times, S2, nodes[:, None], weight)
        best = soft_value(torch.tensor(x, dtype=torch.float64), t).item()
        gaps.append(loss.item() - TAU / 2 * (math.log(2 * math.pi) + 1) - best)
    assert min(gaps) > 0
    assert min(gaps) < 0.1


def chain_gaussians(policy, s2):
    """KL of the policy's whole trajectory to the backward chain from q(x_T), KL of x_T alone, in one dimension."""
    size = NUM_STEPS + 1
    a, b, var = policy.a.detach(), policy.b.detach()[:, 0], (2 * policy.log_sigma.detach()).exp()
    forward, mean, noise = (
        torch.eye(size, dtype=torch.float64),
        torch.zeros(size, dtype=torch.float64),
        torch.cat((torch.ones(1, dtype=torch.float64), var)),
    )
    for t in range(NUM_STEPS):
        forward[t + 1] = a[t] * forward[t]
        forward[t + 1, t + 1] = 1.0
        mean[t + 1] = a[t] * mean[t] + b[t]
    covariance = forward @ noise.diag() @ forward.T
    target_var = TAU / CURVATURE  # q(x_T) = N(m, tau/k)
    backward = torch.triu(torch.ones(size, size, dtype=torch.float64))
    target = backward @ torch.cat((s2, torch.tensor([target_var], dtype=torch.float64))).diag() @ backward.T

    def divergence(mean, covariance, target):
        solve = torch.linalg.solve(target, covariance)
        away = mean - CENTRE[0]
        quadratic = away @ torch.linalg.solve(target, away)
        return 0.5 * (solve.trace() + quadratic - len(mean) + target.logdet() - covariance.logdet())

    joint = divergence(mean, covariance, target)
    return joint, divergence(mean[-1:], covariance[-1:, -1:], target[-1:, -1:]), covariance, mean


def line_policy():
    return LinearPolicy([0.9, 0.7, 0.8], [[0.1], [-0.3], [0.2]], [-0.5, -0.8, -1.1])


def test_the_objective_is_the_bound():
    """``J = tau (KL(joint) + H(x_0) - ln Z - 1/2 sum ln 2 pi s^2)``, and the KL of x_T is no greater."""
    policy = line_policy()
    joint, marginal, *_ = chain_gaussians(policy, S2)
    k, h, c = CURVATURE, CURVATURE * CENTRE[0], 0.5 * CURVATURE * CENTRE[0] ** 2
    noise, weight = quadrature(1)
    # The expected cost of the whole trajectory by nested quadrature, with the library's losses as costs per step.
    points = torch.zeros(1, 1, dtype=torch.float64) + noise  # x_0
    masses, total = weight / weight.sum(), torch.zeros((), dtype=torch.float64)
    for t in range(NUM_STEPS):
        x, z = points.repeat_interleave(3, 0), noise.repeat(len(points), 1)
        masses = masses.repeat_interleave(3) * (weight / weight.sum()).repeat(len(points))
        zero = DxMINetworks(policy, lambda x, index: torch.zeros(len(x), dtype=x.dtype))
        trajectory = Trajectory(x.expand(NUM_STEPS + 1, -1, -1), torch.zeros(NUM_STEPS, len(x)).double())
        times = torch.full((len(x),), t)
        loss, _ = policy_loss(CONFIG, zero, trajectory, times, S2, z, masses * len(masses))
        total = total + loss.detach() - CONSTANT / DIM
        mean, log_sigma = policy(x, times)
        points = (mean + log_sigma.exp()[:, None] * z).detach()
    final = 0.5 * k * points[:, 0].square() - h * points[:, 0] + c
    objective = total + (final * masses).sum()
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    log_z = 0.5 * math.log(2 * math.pi * TAU / CURVATURE)
    want = TAU * (joint + entropy - log_z - 0.5 * torch.log(2 * math.pi * S2).sum())
    assert objective.item() == pytest.approx(want.item(), abs=1e-9)
    assert 0 < marginal <= joint


def test_the_adapted_velocity_is_the_tightest():
    policy = line_policy()
    _, _, covariance, mean = chain_gaussians(policy, S2)
    moves = torch.stack(
        [
            covariance[t, t] + covariance[t + 1, t + 1] - 2 * covariance[t, t + 1] + (mean[t + 1] - mean[t]) ** 2
            for t in range(NUM_STEPS)
        ]
    )
    s2 = S2
    for _ in range(4000):
        s2 = adapt_velocity(s2, moves, 0.99)
    torch.testing.assert_close(s2, moves, rtol=1e-12, atol=0)
    best = chain_gaussians(policy, s2)[0]
    for t, factor in itertools.product(range(NUM_STEPS), (0.9, 1.1)):
        other = s2.clone()
        other[t] *= factor
        assert chain_gaussians(policy, other)[0] > best + 1e-4
    # What a rollout reports: 1/2 per dimension at every step.
    num = 20_000
    draws = draw(CONFIG, (1,), seed=0, step=0, slots=torch.arange(num))
    trajectory = rollout(policy, draws.start.double(), draws.rollout.double())
    torch.testing.assert_close(trajectory.moves / (2 * s2), torch.full_like(s2, 0.5), rtol=0.05, atol=0)


def test_energy_optimum_on_a_histogram():
    gamma = 0.7
    data = torch.tensor([0] * 5 + [1] * 2 + [2] * 1 + [3] * 2)
    samples = torch.tensor([0] * 1 + [1] * 2 + [2] * 6 + [3] * 1)
    p, pi = (torch.bincount(bins, minlength=4).double() / len(bins) for bins in (data, samples))
    best = ((pi - p) / (2 * gamma * (p + pi))).requires_grad_(True)
    assert best.abs().max() <= 1 / (2 * gamma)
    config = DxMIConfig(num_steps=1, gamma=gamma)

    def loss(table, samples):
        return energy_loss(config, DxMINetworks(None, None, lambda bins: table[bins]), data, samples)[0]

    value = loss(best, samples)
    (slope,) = torch.autograd.grad(value, best)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-15)
    assert value.item() == pytest.approx((-((p - pi) ** 2 / (p + pi)).sum() / (4 * gamma)).item(), abs=1e-14)
    zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    value = loss(zero, data)
    assert value == 0
    torch.testing.assert_close(torch.autograd.grad(value, zero)[0], torch.zeros_like(zero), rtol=0, atol=1e-15)
