"""What stages are made of: networks with their engines, weights that fit, samples of the averaged weights."""

import functools
import sys

import torch
from torch import Tensor, nn

from maskdm_fast.diffusion import Denoiser
from maskdm_fast.diffusion.masking import Grid, Mask, NoMask
from maskdm_fast.models import TRANSFERABLE, UViT, UViTConfig, changed_fields, transfer
from maskdm_fast.models.layers import Block
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.costs import counts_of_mask, model_flops
from maskdm_fast.train.engine import DTYPES, Engine, EngineSettings, OptimizerSettings, Values, make_engine
from maskdm_fast.train.generation import generate
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

_SHOWN = 10


def meta_network(config: RunConfig) -> UViT:
    """The network of a run, without memory."""
    with torch.device("meta"):
        return UViT(config.model)


def initial_values(config: RunConfig, weights: Weights | None, world: World) -> Values:
    """Where a network of the run begins: at `weights`, resized to its image and patch size, or at its seed's draws.

    Raises:
        ValueError: `weights` do not fit; the message names the tensors.
    """
    shapes = meta_network(config)
    if weights is None:
        return functools.partial(shapes.initial_value, seed=config.seed)
    return _fitting(shapes, weights, world).__getitem__


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
    config: RunConfig, world: World, model: nn.Module, optimizer: OptimizerSettings, values: Values
) -> Engine:
    """The engine that the run asks for, around one of its networks.

    Args:
        config: of the run; its engine is not auto.
        world: the processes.
        model: the network, or what has it inside, on the meta device; it becomes the engine's.
        optimizer: its settings.
        values: of the parameters.
    """
    machine = config.machine
    for module in model.modules():
        if isinstance(module, UViT):
            module.activation_checkpointing = machine.activation_checkpointing
    blocks = tuple(module for module in model.modules() if isinstance(module, Block))
    settings = EngineSettings(
        config.precision,
        len(world.micro_batches(config.stage.batch_size, machine.micro_batch_size)),
        blocks if machine.compile else (),
        machine.layer_norm,
        machine.cuda_graph,
    )
    return make_engine(machine.engine, model, optimizer, settings, world, values)


def frozen_teacher(config: RunConfig, teacher: Weights, world: World) -> Denoiser:
    """The teacher of a distillation: every process holds it whole, in the precision of the run, without gradients.

    Raises:
        ValueError: it has another network, schedule or kind of prediction than the run.
    """
    there, here = teacher.config, config
    if there.model != here.model:
        words = ", ".join(
            f"{name} {old} -> {new}" for name, (old, new) in changed_fields(there.model, here.model).items()
        )
        raise ValueError(f"the student has another network than its teacher {teacher.checkpoint.path}: {words}")
    for name in ("schedule", "prediction"):
        old, new = getattr(there.diffusion, name), getattr(here.diffusion, name)
        if old != new:
            raise ValueError(f"the teacher {teacher.checkpoint.path} has {name} {old}, the run {new}; want the same")
    model = meta_network(config)
    dtype = DTYPES[config.precision]
    tensors = {name: tensor.to(world.device, dtype) for name, tensor in teacher.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    schedule = config.diffusion.noise_schedule(config.model)
    return Denoiser(model.requires_grad_(False).eval(), schedule, config.diffusion.prediction)


def preview(
    config: RunConfig,
    tensors: dict[str, Tensor],
    world: World,
    num_images: int,
    labels: Tensor | None,
    num_steps: int | None = None,
) -> Tensor:
    """Sample as `Stage.preview`; every process a share.

    Args:
        config: of the run.
        tensors: averaged weights of the network that is sampled.
        world: the processes.
        num_images, labels: as of `Stage.preview`.
        num_steps: of the sampler; None: those that a student was made for.
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
            seed=config.seed,
            first_slot=mine[0],
            labels=None if labels is None else labels[mine],
            device=world.device,
        )

    return torch.cat([images for images in world.everywhere(draw) if images is not None])


@functools.lru_cache(maxsize=64)
def flops_of_training(config: UViTConfig, mask: Mask, unmasked_share: float, grid: Grid) -> float:
    """Of forward and backward pass on one image, on average."""
    return model_flops(config, counts_of_mask(mask, unmasked_share, grid))


def evaluation_flops(config: RunConfig) -> float:
    """Of one forward pass of the network on one whole image: a third of a training step."""
    side = config.model.image_size // config.model.patch_size
    return flops_of_training(config.model, NoMask(), 0.0, (side, side)) / 3.0


def _fitting(model: UViT, weights: Weights, world: World) -> dict[str, Tensor]:
    """Trained weights, resized to the model's image and patch size; or raise ValueError naming what does not fit."""
    own, tensors = model.state_dict(), weights.tensors
    changed = changed_fields(weights.config.model, model.config)
    if changed and changed.keys() <= TRANSFERABLE:
        tensors = transfer(tensors, weights.config.model, model.config)
        words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items()))
        if world.is_main:
            print(f"the weights of {weights.checkpoint.path} were made to fit: {words}", file=sys.stderr, flush=True)
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
