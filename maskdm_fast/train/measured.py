"""What a network that is no U-ViT keeps and moves: found on the meta device, where nothing is computed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskdm_fast.distill.costs import BACKWARD, Gradients
from maskdm_fast.ops.work import Work


@dataclass(frozen=True)
class Measured:
    """Of one call.

    Attributes:
        forward, backward: its work.
        saved: bytes that the forward pass keeps for the backward pass, weights apart.
    """

    forward: Work
    backward: Work
    saved: float


class _Traffic(TorchDispatchMode):
    """Adds up the inputs and outputs of what is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        return result


def measured(module: nn.Module, flops: float, gradients: Gradients, *inputs: Tensor) -> Measured:
    """Run `module` with gradients as `Pass` has them.

    Args:
        module: on the meta device; whether its parameters ask for gradients is changed.
        flops: of a forward pass.
        gradients: how far back they go.
        inputs: on the meta device; the first is what may have a gradient.
    """
    module.requires_grad_(gradients in ("weights", "both"))
    first = inputs[0].detach().requires_grad_(gradients in ("inputs", "both"))
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # holding them keeps their addresses their own

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with _Traffic() as forward, saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(first, *inputs[1:])
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    with _Traffic() as backward:
        if gradients != "none":
            out.backward(torch.empty_like(out))
    return Measured(
        Work(flops, 0.0, forward.bytes), Work(flops * BACKWARD[gradients], 0.0, backward.bytes), float(saved)
    )
