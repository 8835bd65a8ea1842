"""DxMI on eight Gaussians in the plane, beside the published table: ``python -m benchmarks.dxmi2d --json``.

A policy of five steps and a value that knows the time train each other, with a diffusion model as the start of the
policy or none. Samples are judged by the sliced Wasserstein-2 distance (SW) to fresh data, the energy by the AUC at
which it tells data from uniform noise. What is judged is the running mean of the weights after the last iteration; no
iterate is picked. The paper states neither networks nor learning rates: those here are a reconstruction.
"""

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, DiscreteSchedule
from maskdm_fast.distill.dxmi import DxMINetworks, update_loss
from maskdm_fast.distill.dxmi_anomaly import auroc
from maskdm_fast.distill.dxmi_config import DxMIConfig
from maskdm_fast.distill.dxmi_networks import PointDenoiser, PointValue
from maskdm_fast.distill.dxmi_policy import GaussianPolicy, ddpm_policy, generate, make_policy
from maskdm_fast.distill.dxmi_rollout import Draws, adapt_velocity, draw, rollout
from maskdm_fast.distill.networks import frozen
from maskdm_fast.random import Stream
from maskdm_fast.train.extras import require

NUM_STEPS = 5
SEEDS = 5
BOX = 4.0
"""Half the side of the square that holds the data: where the noise is that the energy has to tell from them."""
RADIUS, STD = 4 / 1.414, 0.5 / 1.414
ARMS = ((0.0, True), (0.01, True), (0.1, True), (1.0, True), (0.1, False))
"""tau, and whether a diffusion model is trained first."""
PAPER = {
    (0.0, True): (0.074, 0.707),
    (0.01, True): (0.074, 0.751),
    (0.1, True): (0.068, 0.898),
    (1.0, True): (1.030, 0.842),
    (0.1, False): (0.076, 0.883),
}
"""SW and AUC of Yoon et al., "Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based
Models", NeurIPS 2024, table 1."""
_EVALUATION = 1 << 40  # added to the seed of a run, so that it is judged on draws that it has not seen
_CHUNK = 50  # iterations whose numbers are drawn at once


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run is trained. All learning rates fall to 0 over the last third, as a cosine.

    Args:
        iterations: of DxMI.
        batch: points per iteration.
        pretrain_steps: of the diffusion model, at a learning rate of 1e-3.
        value_lr: of energy and value.
        policy_lr: of the policy's network.
        sigma_lr: of its log sigmas.
        clip: largest norm of the gradient of the policy's network.
        ema: decay of the running means of the weights, less at first.
        evaluate: points of each kind in the scores.
        projections: directions of the sliced distance.
    """

    iterations: int = 6000
    batch: int = 128
    pretrain_steps: int = 1000
    value_lr: float = 2e-3
    policy_lr: float = 7e-4
    sigma_lr: float = 1e-2
    clip: float = 0.1
    ema: float = 0.995
    evaluate: int = 10_000
    projections: int = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run came to: its scores, the `seconds` that a core worked on its training, and for the figure samples and
    energies on a grid."""

    sw: float
    auc: float
    seconds: float
    samples: Tensor
    energy: Tensor


def sample_data(num: int, *, seed: int, step: int = 0) -> Tensor:
    """``[num, 1, 2]``: eight Gaussians on a circle."""
    where = {"seed": seed, "step": step, "slots": torch.arange(num)}
    angle = (random.uniform(1, stream=Stream.LABEL, **where)[:, 0] * 8).floor() * (math.pi / 4)
    centre = RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1)
    return (centre + STD * random.normal(2, stream=Stream.NOISE, **where))[:, None]


def log_density(x: Tensor) -> Tensor:
    """``ln p(x)`` of the data but for a constant, ``[..., 2]`` to ``[...]``."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1)
    return torch.logsumexp(-(x[..., None, :] - centres).square().sum(-1) / (2 * STD**2), dim=-1)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int, *, seed: int) -> float:
    """The sliced Wasserstein-2 distance of two sets of equally many points, ``[N, 2]`` each."""
    angle = math.pi * random.uniform(projections, seed=seed, stream=Stream.SUBSET, step=0, slots=torch.zeros(1).long())
    directions = torch.cat((angle.cos(), angle.sin()))  # [2, projections]
    along_x, along_y = ((points @ directions).sort(dim=0).values for points in (x, y))
    return (along_x - along_y).square().mean().sqrt().item()


def teacher_schedule() -> DiscreteSchedule:
    """``beta = 1e-5 + (1e-2 - 1e-5) sigmoid(-6..6)`` in five steps."""
    beta = 1e-5 + (1e-2 - 1e-5) * torch.sigmoid(torch.linspace(-6, 6, NUM_STEPS, dtype=torch.float64))
    return DiscreteSchedule(torch.cumprod(1.0 - beta, dim=0))


def pretrain(network: PointDenoiser, schedule: DiscreteSchedule, recipe: Recipe, seed: int) -> None:
    """Train `network` to predict eps."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    slots = torch.arange(recipe.batch)
    for step in range(recipe.pretrain_steps):
        where = {"seed": seed, "step": step, "slots": slots}
        t = schedule.timesteps(random.uniform(1, stream=Stream.TIMESTEP, **where)[:, 0])
        eps = random.normal(2, stream=Stream.POLICY_NOISE, **where)[:, None]
        alpha, sigma = (scale[:, None, None] for scale in schedule.alpha_sigma(t))
        xt = torch.addcmul(sigma * eps, alpha, sample_data(recipe.batch, seed=seed, step=step))
        optimizer.zero_grad()
        (network(xt, t) - eps).square().mean().backward()
        optimizer.step()


def train(tau: float, pretrained: bool, seed: int, recipe: Recipe) -> tuple[GaussianPolicy, PointValue]:
    """The running means of policy and value after the last iteration."""
    schedule = teacher_schedule()
    network = PointDenoiser(2, NUM_STEPS, seed=2 * seed)
    if pretrained:
        pretrain(network, schedule, recipe, seed)
    steps = ddpm_policy(schedule, alpha_bars=schedule.alpha_bar.flip(0).tolist(), std="beta")
    policy = make_policy(Denoiser(network, schedule, "eps"), steps, num_fixed=0)
    value = PointValue(2, NUM_STEPS + 1, hidden=128, seed=2 * seed + 1)
    networks = DxMINetworks(policy, value)
    config = DxMIConfig(
        num_steps=NUM_STEPS,
        tau_entropy=tau,
        tau_velocity=tau,
        # The entropy depends on the time alone: a constant in the values, at tau 1 far larger than all else there.
        entropy_in_value=None,
        velocity_in_value=0,
        time_cost="none",
        # The values have to keep ahead of the policy: with as many updates of it the two circle each other at tau 0.
        num_policy_updates=1,
    )
    sigma = {"params": [policy.log_sigma], "lr": recipe.sigma_lr}
    optimizers = {
        "value": torch.optim.Adam(value.parameters(), lr=recipe.value_lr, fused=True),
        "policy": torch.optim.Adam([{"params": network.parameters(), "lr": recipe.policy_lr}, sigma], fused=True),
    }
    groups = [(group, group["lr"]) for optimizer in optimizers.values() for group in optimizer.param_groups]
    averages = copy.deepcopy((policy, value))
    trained = [*policy.parameters(), *value.parameters()]
    averaged = [parameter.detach() for model in averages for parameter in model.parameters()]
    s2 = policy.all_log_sigma().detach().mul(2.0).exp()
    for iteration in range(recipe.iterations):
        place = iteration % _CHUNK
        if place == 0:
            chunk = _numbers(config, recipe, seed, iteration)
        data, draws = chunk[place]
        phase = max(0.0, 3.0 * iteration / recipe.iterations - 2.0)
        for group, lr in groups:
            group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * phase))
        trajectory = rollout(policy, draws.start, draws.rollout)
        s2 = adapt_velocity(s2, trajectory.moves, config.avr_decay)
        for update in config.updates():
            optimizer = optimizers["policy" if update.network == "policy" else "value"]
            optimizer.zero_grad()
            with frozen(value if update.network == "policy" else policy):
                loss, _ = update_loss(update, config, networks, data=data, trajectory=trajectory, s2=s2, draws=draws)
            loss.backward()
            if update.network == "policy":
                torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
            optimizer.step()
        decay = min(recipe.ema, (1.0 + iteration) / (10.0 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1.0 - decay)
    return averages


def _numbers(config: DxMIConfig, recipe: Recipe, seed: int, first: int) -> list[tuple[Tensor, Draws]]:
    """Data and draws of the iterations from `first` on: the same numbers as one by one, for the price of few calls."""
    step = torch.arange(first, first + _CHUNK).repeat_interleave(recipe.batch)
    draws = draw(config, (1, 2), seed=seed, step=step, slots=torch.arange(recipe.batch).repeat(_CHUNK))
    rows = []
    for place in range(_CHUNK):
        own = slice(place * recipe.batch, (place + 1) * recipe.batch)
        cut = Draws(draws.start[own], draws.rollout[:, own], draws.times[:, own], draws.update[:, own], None)
        rows.append((sample_data(recipe.batch, seed=seed, step=recipe.pretrain_steps + first + place), cut))
    return rows


@dataclasses.dataclass(frozen=True)
class Judge:
    """Fresh data and noise of one seed, ``[N, 2]``."""

    recipe: Recipe
    seed: int

    @property
    def data(self) -> Tensor:
        """What samples are compared with."""
        return sample_data(self.recipe.evaluate, seed=self.seed + _EVALUATION)[:, 0]

    @property
    def noise(self) -> Tensor:
        """Uniform in the box."""
        where = {"seed": self.seed + _EVALUATION, "step": 0, "slots": torch.arange(self.recipe.evaluate)}
        return BOX * (2.0 * random.uniform(2, stream=Stream.TIMESTEP, **where) - 1.0)

    def sw(self, samples: Tensor) -> float:
        """Sliced Wasserstein distance of `samples` ``[N, 2]`` to data."""
        return sliced_wasserstein(samples, self.data, self.recipe.projections, seed=self.seed + _EVALUATION)

    def floor(self) -> tuple[float, float]:
        """SW of more data, and AUC of the true density."""
        more = sample_data(self.recipe.evaluate, seed=self.seed + _EVALUATION, step=1)[:, 0]
        return self.sw(more), auroc(-log_density(self.data), -log_density(self.noise))


def run(tau: float, pretrained: bool, seed: int, recipe: Recipe) -> Run:
    """Train and judge."""
    torch.set_num_threads(1)
    begin = time.process_time()
    policy, value = train(tau, pretrained, seed, recipe)
    seconds = time.process_time() - begin
    config, slots = DxMIConfig(num_steps=NUM_STEPS), torch.arange(recipe.evaluate)
    draws = draw(config, (1, 2), seed=seed + _EVALUATION, step=0, slots=slots)
    samples = generate(policy, draws.start, draws.rollout)[:, 0]
    side = torch.linspace(-BOX, BOX, 81)
    judge = Judge(recipe, seed)

    def energy(x: Tensor) -> Tensor:
        with torch.no_grad():
            return value(x, torch.full(x.shape[:1], NUM_STEPS))

    grid = energy(torch.cartesian_prod(side, side)).view(81, 81)
    return Run(judge.sw(samples), auroc(energy(judge.data), energy(judge.noise)), seconds, samples, grid)


def summarize(tau: float, pretrained: bool, runs: list[Run]) -> dict[str, Any]:
    """One row: means and standard deviations over the seeds, and the mean work of training."""
    row: dict[str, Any] = {"tau": tau, "pretrain": pretrained}
    for name in ("sw", "auc"):
        values = [getattr(run, name) for run in runs]
        row[f"{name}_mean"] = round(statistics.mean(values), 4)
        row[f"{name}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
    return {**row, "seconds": round(statistics.mean(run.seconds for run in runs), 1)}


def draw_figure(runs: list[tuple[float, bool, Run]], path: Path) -> None:
    """Samples above energies, one column per arm.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "eval").Figure(figsize=(2.4 * len(runs), 5.0), layout="constrained")
    panels = figure.subplots(2, len(runs), squeeze=False)
    for column, (tau, pretrained, result) in enumerate(runs):
        above, below = panels[:, column]
        above.set_title(f"tau {tau:g}" + ", no pretraining" * (not pretrained), fontsize=9)
        above.scatter(*result.samples[:4000].T.numpy(), s=0.6, color="#2a5caa", linewidths=0)
        shown = below.imshow(result.energy.T.numpy(), origin="lower", extent=(-BOX, BOX, -BOX, BOX), cmap="magma")
        figure.colorbar(shown, ax=below, shrink=0.6, orientation="horizontal").ax.tick_params(labelsize=7)
        for axes in (above, below):
            axes.set(xlim=(-BOX, BOX), ylim=(-BOX, BOX), xticks=[], yticks=[], aspect="equal")
    panels[0, 0].set_ylabel("samples", fontsize=9)
    panels[1, 0].set_ylabel("energy", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def table(result: dict[str, Any]) -> str:
    """`result` for people."""
    lines = [f"{'tau':>6}{'pretrain':>10}{'SW':>17}{'paper':>8}{'AUC':>17}{'paper':>8}{'seconds':>9}"]
    for row in result["rows"]:
        paper = PAPER.get((row["tau"], row["pretrain"]))
        theirs = [f"{value:.3f}" for value in paper] if paper else ["-", "-"]
        ours = [f"{row[name + '_mean']:.3f} +- {row[name + '_std']:.3f}" for name in ("sw", "auc")]
        lines.append(
            f"{row['tau']:>6g}{'yes' if row['pretrain'] else 'no':>10}{ours[0]:>17}{theirs[0]:>8}"
            f"{ours[1]:>17}{theirs[1]:>8}{row['seconds']:>9.1f}"
        )
    floor = result["floor"]
    lines.append(f"data against data: SW {floor['sw']:.3f}; the true density: AUC {floor['auc']:.3f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dxmi2d", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/dxmi2d-<machine>.json")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=Recipe.iterations, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--figure", type=Path, help="draw samples and energies of the first seed to this file")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.iterations, options.processes) < 1:
        parser.error("--seeds, --iterations and --processes must be at least 1")
    harness.refuse_to_save_a_part(parser, options, "seeds", "iterations")
    recipe = Recipe(iterations=options.iterations)
    result = harness.environment()
    result["recipe"] = dataclasses.asdict(recipe)
    floors = [Judge(recipe, seed).floor() for seed in range(options.seeds)]
    result["floor"] = {
        name: round(statistics.mean(v), 4) for name, v in zip(("sw", "auc"), zip(*floors, strict=True), strict=True)
    }
    tasks = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    runs: dict[tuple[float, bool], list[Run]] = {arm: [] for arm in ARMS}
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(run, *arm, seed, recipe) for arm, seed in tasks]
        for (arm, seed), future in zip(tasks, pending, strict=True):
            done = future.result()
            runs[arm].append(done)
            print(
                f"tau {arm[0]:g}, pretrained {arm[1]}, seed {seed}: SW {done.sw:.3f}, AUC {done.auc:.3f}",
                file=sys.stderr,
            )
    result["rows"] = [summarize(*arm, runs[arm]) for arm in ARMS]
    if options.figure:
        draw_figure([(*arm, runs[arm][0]) for arm in ARMS], options.figure)
    if options.save:
        harness.save(result, "dxmi2d")
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
