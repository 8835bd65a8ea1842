"""DxMI on images: a policy of few steps and a value, trained by each other."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskdm_fast import ops, random
from maskdm_fast.diffusion import Denoiser
from maskdm_fast.distill import DxMIConfig, DxMINetworks, adapt_velocity, frozen, rollout, update_loss
from maskdm_fast.distill.dxmi_config import Update
from maskdm_fast.distill.dxmi_policy import DenoiserMean, join_policy
from maskdm_fast.distill.dxmi_rollout import Draws, Policy, Trajectory, draw
from maskdm_fast.random import Stream
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.engine import Engine, OptimizerSettings
from maskdm_fast.train.metrics import Values
from maskdm_fast.train.pieces import Part, Pieces, Reader, Renamed
from maskdm_fast.train.stages.base import PREVIEW_STEPS, Batch
from maskdm_fast.train.stages.parts import (
    Trained,
    check_teacher,
    engine_of,
    evaluation_flops,
    initial_values,
    mean_of_processes,
    meta_network,
    optimizer_settings,
    preview,
)
from maskdm_fast.train.students import SIGMAS
from maskdm_fast.train.weights import VALUE, Weights
from maskdm_fast.train.world import World

VELOCITY = "velocity"
"""The group of the s_t^2 to which moves are compared."""
_LOSS = {"energy": "loss", "value": "value_loss", "policy": "policy_loss"}


@dataclasses.dataclass(frozen=True)
class _Call:
    """A module as losses call it, in the precision of its own engine."""

    engine: Engine
    module: nn.Module

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        with self.engine.autocast():
            return self.module(*inputs)


@dataclasses.dataclass(frozen=True)
class _Micro:
    """A micro-batch of an iteration.

    Attributes:
        data: ``[B, N, P*P*C]``, real images.
        draws: the random numbers.
        trajectory: of the policy before the updates.
        weight: its share of this process's images.
    """

    data: Tensor
    draws: Draws
    trajectory: Trajectory
    weight: float


class PolicyDistillationStage:
    """Implements `Stage` with a policy, whose network and sigmas are trained apart, and the value, which is also the
    energy.

        step:  trajectories = rollout of the policy as it is
               s2 = adapt_velocity(s2, their moves, the mean over the global batch)
               for each of `DxMIConfig.updates`, one step of its network:
                   loss = mean over the global batch of `update_loss`

    ``loss`` is that of the energy. The best energy would have it between -1/(2 gamma) and 0, where samples cannot be
    told from data: then ``energy_data`` and ``energy_samples`` agree. ``value/t`` falls with the time t where time has
    a cost, and ``velocity/t`` is 1/2 at rest. ``value_loss`` and ``policy_loss`` are means over the updates of a step.

    Args:
        config: of the run.
        policy: the network of the policy, with the moving average, which is what is sampled.
        sigmas: `LogSigmas` of the policy, in every process whole, whatever the engine of the run.
        value: the value.
        value_flops: of one of its forward passes.
        world: the processes.
    """

    def __init__(
        self, config: RunConfig, policy: Trained, sigmas: Trained, value: Trained, value_flops: float, world: World
    ) -> None:
        stage = config.stage
        self._config, self._world, self._value_flops = config, world, value_flops
        self._policy, self._sigmas, self._value = policy, sigmas, value
        self._method: DxMIConfig = stage.method()
        schedule = config.diffusion.noise_schedule(config.model)
        steps = stage.steps(schedule)
        self._start_std = steps.start_std

        def policy_of(network: nn.Module, log_sigmas: nn.Module) -> Policy:
            student = Denoiser(_Call(policy.engine, network), schedule, config.diffusion.prediction)
            return join_policy(DenoiserMean(student, steps), log_sigmas)

        # What is not trained in an update is called by itself: an engine would prepare for its gradients.
        self._acting = policy_of(policy.module, sigmas.module)
        self._in_value_update = DxMINetworks(self._acting, _Call(value.engine, value.engine.model))
        self._in_policy_update = DxMINetworks(
            policy_of(policy.engine.model, sigmas.engine.model), _Call(value.engine, value.module)
        )
        self._s2 = sigmas.module.all_log_sigma().detach().mul(2.0).exp()
        for player in (policy, value):
            player.engine.rest()

    @classmethod
    def build(
        cls, config: RunConfig, world: World, weights: Weights | None, teacher: Weights | None = None
    ) -> "PolicyDistillationStage":
        stage, machine = config.stage, config.machine
        check_teacher(config, teacher)
        settings = optimizer_settings(config)
        network = meta_network(config)
        values = initial_values(config, teacher if weights is None else weights, world)
        policy = Trained(engine_of(config, world, network, settings, values), network)

        sigmas = stage.log_sigmas(stage.steps(config.diffusion.noise_schedule(config.model)))
        # A handful of numbers: there is nothing to divide, and their optimizer is always the same.
        alone = dataclasses.replace(machine, engine="plain" if world.world_size == 1 else "ddp", layer_norm="pytorch")
        of_sigmas = dataclasses.replace(config, precision="fp32", machine=alone)
        plainly = OptimizerSettings(stage.betas, 0.0, None, stage.ema_decay)
        noise = Trained(engine_of(of_sigmas, world, sigmas, plainly, None), sigmas)

        value = stage.make_value(config.model, seed=config.seed)
        flops = value.flops
        of_value = config if stage.value_precision == "run" else dataclasses.replace(config, precision="fp32")
        # Nobody asks for an average of it, but the kernels of lamb always keep one.
        decay = stage.ema_decay if stage.optimizer == "lamb" else None
        settings = dataclasses.replace(settings, max_grad_norm=stage.value_max_grad_norm, ema_decay=decay)
        judge = Trained(engine_of(of_value, world, value, settings, None), value)
        return cls(config, policy, noise, judge, flops, world)

    def step(self, batches: Sequence[Batch], step: int) -> Values:
        share = sum(len(batch.slots) for batch in batches)
        with self._world.timer.part("forward"):
            micros = [self._explore(batch, step, len(batch.slots) / share) for batch in batches]
        moves = sum(micro.weight * micro.trajectory.moves for micro in micros)
        self._s2 = adapt_velocity(self._s2, mean_of_processes(moves, self._world), self._method.avr_decay)
        sigmas = self._sigmas.module.all_log_sigma().detach().exp()
        found: dict[str, list[Tensor]] = {}
        for of_policy, updates in itertools.groupby(self._method.updates(), lambda update: update.network == "policy"):
            player = self._policy if of_policy else self._value
            player.engine.wake()
            for update in updates:
                for name, value in self._update(update, micros, step).items():
                    found.setdefault(name, []).append(value)
            player.engine.rest()
        return {
            **{name: torch.stack(values).mean() for name, values in found.items()},
            **{f"sigma/{t}": sigma for t, sigma in enumerate(sigmas.unbind())},
        }

    def _explore(self, batch: Batch, step: int, weight: float) -> _Micro:
        """What the policy does before the updates, and the images that it is compared with."""
        config, where = self._config, {"seed": self._config.seed, "step": step, "slots": batch.slots}
        draws = draw(self._method, (config.model.num_tokens, config.model.token_dim), **where)
        labels = batch.labels if config.model.num_classes else None
        trajectory = rollout(self._acting, self._start_std * draws.start, draws.rollout, labels)
        ones = torch.ones(len(batch.slots), device=batch.slots.device)
        flip = None
        if config.stage.hflip:
            flip = random.uniform(1, stream=Stream.FLIP, **where)[:, 0] < config.stage.hflip
        data, _ = ops.noise_visible_patches(
            batch.images,
            None,
            ones,
            torch.zeros_like(ones),
            patch_size=config.model.patch_size,
            flip=flip,
            out_dtype=torch.float32,
            layout="bhwc",
            **where,
        )
        return _Micro(data, draws, trajectory, weight)

    def _update(self, update: Update, micros: Sequence[_Micro], step: int) -> dict[str, Tensor]:
        """One optimizer step of one network while the other is idle; means of its values over the micro-batches."""
        stage, of_policy = self._config.stage, update.network == "policy"
        if of_policy:
            networks, idle = self._in_policy_update, (self._value.module,)
            steps = [(self._policy.engine, stage.lr_at(step)), (self._sigmas.engine, stage.sigma_lr_at(step))]
        else:
            # The policy acts without autograd there.
            networks, idle = self._in_value_update, ()
            steps = [(self._value.engine, stage.value_lr_at(step))]
        means: dict[str, Tensor] = {}
        for place, micro in enumerate(micros, start=1):
            with contextlib.ExitStack() as contexts:
                for engine, _ in steps:
                    contexts.enter_context(engine.micro_batch(last=place == len(micros)))
                # Until after the backward pass, in which checkpointed blocks are computed again.
                contexts.enter_context(frozen(*idle))
                with self._world.timer.part("forward"):
                    loss, values = update_loss(
                        update,
                        self._method,
                        networks,
                        data=micro.data,
                        trajectory=micro.trajectory,
                        s2=self._s2,
                        draws=micro.draws,
                    )
                steps[0][0].backward(loss * micro.weight)
            for name, value in {_LOSS[update.network]: loss.detach(), **values}.items():
                means[name] = means.get(name, 0.0) + micro.weight * value
        norms = [engine.step(lr)["grad_norm"] for engine, lr in steps]
        return {**means, "grad_norm" if of_policy else "value_grad_norm": norms[0]}

    def lr(self, step: int) -> float:
        return self._config.stage.lr_at(step)

    def flops_per_image(self, step: int) -> float:
        policy, value = evaluations(self._method)
        return policy * evaluation_flops(self._config) + value * self._value_flops

    def tokens_per_image(self, step: int) -> float:
        return self._config.model.num_extras + self._config.model.num_tokens

    def preview(self, num_images: int, *, labels: Tensor | None = None, num_steps: int = PREVIEW_STEPS) -> Tensor:
        sigmas = {SIGMAS + name: tensor for name, tensor in self._sigmas.engine.averaged().items()}
        tensors = {**self._policy.engine.averaged(), **sigmas}
        return preview(self._config, tensors, self._world, num_images, labels)

    def pieces(self) -> Pieces:
        groups = {group: dict(pieces) for group, pieces in self._policy.engine.pieces().items()}
        for group, pieces in self._sigmas.engine.pieces().items():
            groups[group].update({SIGMAS + name: piece for name, piece in pieces.items()})
        value = {f"{VALUE}{group}": pieces for group, pieces in self._value.engine.pieces().items() if pieces}
        # The same in all processes.
        shared = {VELOCITY: {"s2": self._s2}} if self._world.is_main else {}
        return {**groups, **value, **shared}

    def load(self, reader: Reader) -> None:
        self._policy.engine.load(Part(reader, SIGMAS, rest=True))
        self._sigmas.engine.load(Part(reader, SIGMAS))
        self._value.engine.load(Renamed(reader, VALUE))
        self._s2 = reader.tensor(VELOCITY, "s2").to(self._s2)
        for player in (self._policy, self._value):
            player.engine.rest()

    def close(self) -> None:
        for player in (self._policy, self._sigmas, self._value):
            player.engine.close()


def evaluations(method: DxMIConfig) -> tuple[float, float]:
    """Forward passes of policy and value for one image in an iteration; a backward pass is 2, to the input alone 1.

    policy:  T of the rollout, T again if values draw anew, 3 in each of its updates
    value:   6 of the energy, on two images; 4 for each of T targets and values; 2 in each update of the policy
    """
    steps, updates = method.num_steps, method.num_policy_updates
    return steps * (2.0 if method.resample else 1.0) + 3.0 * updates, 6.0 + 4.0 * steps + 2.0 * updates
