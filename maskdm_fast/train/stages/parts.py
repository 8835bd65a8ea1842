"""What stages are made of: networks with their engines, weights that fit, samples of the averaged weights."""

import functools
import itertools
import math
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskdm_fast.diffusion import Denoiser
from maskdm_fast.diffusion.masking import Grid, Mask, NoMask
from maskdm_fast.models import TRANSFERABLE, UViT, UViTConfig, changed_fields, transfer
from maskdm_fast.models.layers import Block
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.costs import counts_of_mask, model_flops
from maskdm_fast.train.engine import DTYPES, Engine, EngineSettings, OptimizerSettings, Values, make_engine
from maskdm_fast.train.generation import generate, meta_network
from maskdm_fast.train.regression_config import is_told
from maskdm_fast.train.teachers import check_kind
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

LEVEL_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels sigma/alpha between the bins of a logged distance."""
LEVEL_NAMES = tuple(f"{low:g}-{high:g}" for low, high in itertools.pairwise((0.0, *LEVEL_EDGES, math.inf)))
_SHOWN = 10


@dataclass(frozen=True)
class Trained:
    """One of the modules that are trained.

    Attributes:
        engine: trains it.
        module: the module itself; what calls it through the engine takes part in an update.
    """

    engine: Engine
    module: nn.Module


def initial_values(config: RunConfig, weights: Weights | None, world: World) -> Values:
    """Where a network of the run begins: at `weights`, resized to its image and patch size, or at its seed's draws.
    A network that is told its guidance begins as one that is not.

    Raises:
        ValueError: `weights` do not fit; the message names the tensors.
    """
    if weights is None:
        return functools.partial(meta_network(config).initial_value, seed=config.seed)
    return _fitting(config, weights, world).__getitem__


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """Those of the network that the run is for."""
    stage = config.stage
    return OptimizerSettings(
        stage.betas,
        stage.weight_decay,
        stage.max_grad_norm,
        stage.ema_decay,
        stage.optimizer,
        config.machine.optimizer_kernel,
    )


def engine_of(
    config: RunConfig, world: World, model: nn.Module, optimizer: OptimizerSettings, values: Values | None
) -> Engine:
    """The engine that the run asks for, around one of its networks.

    Args:
        config: of the run; its engine is not auto.
        world: the processes.
        model: the network, or what has it inside, on the meta device; it becomes the engine's.
        optimizer: its settings.
        values: of the parameters; None: the network is not on the meta device and has them.
    """
    machine = config.machine
    _set_checkpointing(config, model)
    blocks = tuple(module for module in model.modules() if isinstance(module, Block))
    settings = EngineSettings(
        config.precision,
        len(world.micro_batches(config.stage.batch_size, machine.micro_batch_size)),
        blocks if machine.compile else (),
        machine.layer_norm,
        machine.cuda_graph,
        machine.offload_idle,
    )
    return make_engine(machine.engine, model, optimizer, settings, world, values)


def check_teacher(config: RunConfig, teacher: Weights) -> None:
    """Raise ValueError unless the student of `teacher` is that of the run: with its network, schedule and what the
    student of its kind of prediction predicts; and unless the stage can distil what it has learnt."""
    there, here = teacher.config, config
    if there.model != here.model:
        words = ", ".join(
            f"{name} {old} -> {new}" for name, (old, new) in changed_fields(there.model, here.model).items()
        )
        raise ValueError(f"the student has another network than its teacher {teacher.checkpoint.path}: {words}")
    if None not in (there.latents, here.latents) and there.latents != here.latents:
        path = teacher.checkpoint.path
        raise ValueError(f"the teacher {path} knows {there.latents}, but the data set has {here.latents}")
    wanted = {
        "schedule": there.diffusion.schedule,
        "prediction": here.stage.student_prediction(there.diffusion.prediction),
    }
    for name, want in wanted.items():
        found = getattr(here.diffusion, name)
        if found != want:
            raise ValueError(f"a student of {teacher.checkpoint.path} has {name} {want}, but the run {found}")
    check_kind(config, teacher)


def frozen_teacher(config: RunConfig, teacher: Weights, world: World) -> Denoiser:
    """The teacher of a distillation: every process holds it whole, in the precision of the run, without gradients.

    Raises:
        ValueError: as `check_teacher`.
    """
    check_teacher(config, teacher)
    model = meta_network(teacher.config)
    _set_checkpointing(config, model)  # gradients may go through it
    dtype = DTYPES[config.precision]
    tensors = {name: tensor.to(world.device, dtype) for name, tensor in teacher.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    schedule = config.diffusion.noise_schedule(config.model)
    return Denoiser(model.requires_grad_(False).eval(), schedule, teacher.config.diffusion.prediction)


def _set_checkpointing(config: RunConfig, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, UViT):
            module.activation_checkpointing = config.machine.activation_checkpointing


def preview(
    config: RunConfig,
    tensors: dict[str, Tensor],
    world: World,
    num_images: int,
    labels: Tensor | None,
    num_steps: int | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Sample as `Stage.preview`; every process a share.

    Args:
        config: of the run.
        tensors: averaged weights of the network that is sampled.
        world: the processes.
        num_images, labels: as of `Stage.preview`.
        num_steps: of the sampler; None: those that a student was made for.
        guidance: its scale.
    """
    mine = torch.arange(num_images).tensor_split(world.world_size)[world.rank].tolist()

    def draw() -> Tensor | None:
        if not mine:
            return None
        return generate(
            config,
            tensors,
            len(mine),
            num_steps=num_steps,
            guidance=guidance,
            seed=config.seed,
            first_slot=mine[0],
            labels=None if labels is None else labels[mine],
            device=world.device,
        )

    return torch.cat([images for images in world.everywhere(draw) if images is not None])


def distance_by_level(denoiser: Denoiser, t: Tensor, distance: Tensor) -> Tensor:
    """Sums and counts of the distances ``[B]`` at the times t ``[B]`` in the bins of `LEVEL_NAMES`, ``[2, bins]``."""
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    level = sigma / alpha
    place = sum((level >= edge).to(torch.int64) for edge in LEVEL_EDGES)
    inside = (place[:, None] == torch.arange(len(LEVEL_NAMES), device=t.device)).to(distance.dtype)  # [B, bins]
    return torch.stack((distance @ inside, inside.sum(0)))


def mean_of_processes(values: Tensor, world: World) -> Tensor:
    """The mean of tensors that all processes have, where they are; the host waits for nothing."""
    if world.world_size == 1:
        return values
    total = values.clone()
    with world.timer.part("communication"):
        dist.all_reduce(total)
    return total / world.world_size


@functools.lru_cache(maxsize=64)
def flops_of_training(config: UViTConfig, mask: Mask, unmasked_share: float, grid: Grid) -> float:
    """Of forward and backward pass on one image, on average."""
    return model_flops(config, counts_of_mask(mask, unmasked_share, grid))


def evaluation_flops(config: RunConfig) -> float:
    """Of one forward pass of the network on one whole image: a third of a training step."""
    side = config.model.image_size // config.model.patch_size
    return flops_of_training(config.model, NoMask(), 0.0, (side, side)) / 3.0


def _fitting(config: RunConfig, weights: Weights, world: World) -> dict[str, Tensor]:
    """Trained weights, resized to the model's image and patch size; or raise ValueError naming what does not fit."""
    model, tensors = meta_network(config), weights.tensors
    own, told = model.state_dict(), is_told(weights.config.stage)
    changed = changed_fields(weights.config.model, config.model)
    if changed and changed.keys() <= TRANSFERABLE and not told:
        tensors = transfer(tensors, weights.config.model, config.model)
        words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items()))
        if world.is_main:
            print(f"the weights of {weights.checkpoint.path} were made to fit: {words}", file=sys.stderr, flush=True)
    if is_told(config.stage) and not told:
        begin = model.initial_value("strength_embed", config.seed)
        tensors = {"strength_embed": begin, **{f"network.{name}": tensor for name, tensor in tensors.items()}}
    problems = [
        f"{name}: {_shape(tensors.get(name))} there, {_shape(own.get(name))} here"
        for name in sorted(own.keys() | tensors.keys())
        if _shape(own.get(name)) != _shape(tensors.get(name))
    ]
    if "num_heads" in changed:  # the one difference that no shape shows
        problems.insert(0, "num_heads: {} there, {} here".format(*changed["num_heads"]))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"the weights of {weights.checkpoint.path} do not fit this model:{shown}{more}\n"
            "Give both runs the same model options."
        )
    return tensors


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
