"""How many operators a train step launches, counted on a real step of a network that is as deep but tiny."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast.diffusion.masking import Mask
from maskdm_fast.train.config import MachineConfig, RunConfig
from maskdm_fast.train.stages import Batch, build_stage
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
    """Launches of a step of the run, eager: what PyTorch dispatches that is no view and allocates nothing.

    A CUDA kernel each at least; some operators take two or three. The step runs on the CPU under autocast, where
    Linears take PyTorch's own products as they do on a GPU, and without autocast's casts if the run is in float32.
    """
    side = _smallest_grid(config.stage.mask, config.model.image_size // config.model.patch_size)
    model = dataclasses.replace(config.model, dim=2, num_heads=1, image_size=side * config.model.patch_size)
    narrow = dataclasses.replace(
        config,
        model=model,
        precision="bf16",
        stage=dataclasses.replace(config.stage, batch_size=2, init_from=None),
        machine=MachineConfig(device="cpu", activation_checkpointing=config.machine.activation_checkpointing),
    )
    stage = build_stage(narrow, World(torch.device("cpu")))
    image = torch.zeros(1, model.image_size, model.image_size, model.channels, dtype=torch.uint8)
    batches = [Batch(image, torch.full((1,), -1), torch.tensor([slot])) for slot in (0, 1)]

    def found(run: Callable[[], Any]) -> Counter[str]:
        with _Counting(casts=config.precision != "fp32") as mode:
            run()
        return mode.found

    stage.step(batches, 0)  # makes the state of the optimizer
    one, two = (found(lambda n=n: stage.step(batches[:n], 1)) for n in (1, 2))
    return Launches(one, two - one)


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
