"""How many operators a train step launches, counted on a real step of a network that is as deep but tiny."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast.diffusion.masking import Mask
from maskdm_fast.models import UViT
from maskdm_fast.train.checkpoint import Checkpoint
from maskdm_fast.train.config import (
    DenoisingConfig,
    MachineConfig,
    PolicyDistillationConfig,
    RunConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.plan import plan_of
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

_OPS = {
    "linear": ("addmm", "mm", "sum"),
    "convolution": ("convolution", "convolution_backward"),
    "layer_norm": ("native_layer_norm", "native_layer_norm_backward"),
    "masked_attention": ("masked_attention_fwd", "masked_attention_bwd"),
    "gelu": ("gelu_fwd", "gelu_bwd", "gelu", "gelu_backward"),
    "noise_visible_patches": ("noise_visible_patches_fwd",),
    "masked_dsm_loss": ("masked_dsm_loss_fwd", "masked_dsm_loss_bwd"),
    "sid_loss": ("sid_loss_fwd", "sid_loss_bwd"),
    "adamw_ema": ("adamw_ema_", "global_norm"),
    "lamb_ema": ("lamb_ema_",),
}
_OP_OF = {operator: op for op, operators in _OPS.items() for operator in operators}
_SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
_SILENT |= {"promote_types", "_record_function_enter_new", "_record_function_exit"}
"""What allocates, renames or only asks: nothing runs for it on a device."""
_DRAWN_STEPS = 8
"""Steps in which the number of a generator's calls is drawn, over which they are averaged."""


@dataclass(frozen=True)
class Launches:
    """By op as in `costs.Part.op`, and ``rest``: random draws, times, sums, joins, clipping.

    Attributes:
        first: a step of one micro-batch, optimizer and all.
        further: every micro-batch after the first, which adds its gradients to those that are there.
    """

    first: Counter[str]
    further: Counter[str]

    def of_step(self, num_micro: int) -> Counter[str]:
        """Of a step with this many micro-batches."""
        return self.first + Counter({op: (num_micro - 1) * count for op, count in self.further.items()})


class _Counting(TorchDispatchMode):
    def __init__(self, casts: bool) -> None:
        super().__init__()
        self._casts = casts
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        # Between the precisions of autocast; a step in float32 has the other conversions too.
        is_cast = name == "_to_copy" and torch.bfloat16 in (args[0].dtype, result.dtype)
        if not (function.is_view or name in _SILENT or (is_cast and not self._casts)):
            self.found["casts" if is_cast else _OP_OF.get(name, "rest")] += 1
        return result


def count_launches(config: RunConfig) -> Launches:
    """Launches of a step of the run, eager: what PyTorch dispatches that is no view and allocates nothing. Where steps
    differ it is their mean, once all losses count.

    A CUDA kernel each at least; some operators take two or three. The step runs on the CPU under autocast, where
    Linears take PyTorch's own products as they do on a GPU, and without autocast's casts if the run is in float32.
    """
    casts, config = config.precision != "fp32", _narrow(config)
    model, world = config.model, World(torch.device("cpu"))
    teacher = None
    if isinstance(config.stage, DistillationConfig):
        there = dataclasses.replace(config, stage=DenoisingConfig(label_drop=0.1))  # it may be guided
        teacher = Weights(there, UViT(model).state_dict(), Checkpoint(Path("teacher"), {}), "ema")
    stage = build_stage(config, world, None, teacher)
    image = torch.zeros(1, model.image_size, model.image_size, model.channels, dtype=torch.uint8)
    batches = [Batch(image, torch.full((1,), -1), torch.tensor([slot])) for slot in (0, 1)]
    period = _period(config)

    def found(num: int, first: int) -> Counter[str]:
        with _Counting(casts) as mode:
            for step in range(first, first + period):
                stage.step(batches[:num], step)
        return Counter({op: count / period for op, count in mode.found.items()})

    found(2, 0)  # makes the state of the optimizers
    one, two = found(1, period), found(2, period)
    return Launches(one, two - one)


def _narrow(config: RunConfig) -> RunConfig:
    """A run that launches the same on a tiny network and two images, on the CPU."""
    stage, machine = config.stage, config.machine
    if isinstance(stage, DenoisingConfig):
        side = _smallest_grid(stage.mask, config.model.image_size // config.model.patch_size)
        model = dataclasses.replace(config.model, image_size=side * config.model.patch_size)
    else:
        # One patch. The image keeps its size, on which the levels of a schedule may depend.
        model = dataclasses.replace(config.model, patch_size=config.model.image_size)
    changes: dict[str, Any] = {"batch_size": 2, "init_from": None}
    if isinstance(stage, ScoreDistillationConfig) and stage.method == "sida":
        changes |= {"freeze_images": 0, "adversarial_from": 0}
    if isinstance(stage, PolicyDistillationConfig):
        changes |= {"value_width": 2, **({"value_heads": 1} if stage.value == "vit" else {})}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, dim=2, num_heads=1),
        precision="bf16",
        stage=dataclasses.replace(stage, **changes),
        machine=MachineConfig(device="cpu", activation_checkpointing=machine.activation_checkpointing),
    )


def _period(config: RunConfig) -> int:
    """Steps after which all kinds of steps were there, in their shares."""
    drawn = isinstance(config.stage, ScoreDistillationConfig) and config.stage.trained_steps == "one"
    return plan_of(config).period * (_DRAWN_STEPS if drawn and config.stage.num_steps > 1 else 1)


def _smallest_grid(mask: Mask, side: int) -> int:
    """Side of the smallest grid of patches on which a mask is drawn as on one of `side`, which suits it."""

    def hides(side: int) -> bool:
        return mask.num_visible((side, side)) < side * side

    def suits(smaller: int) -> bool:
        try:
            mask.validate((smaller, smaller))
        except ValueError:
            return False
        return hides(smaller) == hides(side)

    return next(smaller for smaller in range(1, side + 1) if smaller == side or suits(smaller))
