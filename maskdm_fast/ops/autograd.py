"""What the autograd functions of the ops share."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


class _Refusal(torch.autograd.Function):
    """The gradients as they are, of which nothing can be differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(tensor.data for tensor in tensors[:count])  # not views, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.op}: a second derivative is asked of it, and its gradients have none (once_differentiable); write "
            "this part with PyTorch's own functions"
        )


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """Decorates the backward pass of an op: a second derivative through it raises RuntimeError. It has to save, and as
    they were given, the inputs that its gradients depend on.

    torch's decorator of this name lets two kinds pass as zero: it refuses only where the incoming gradient is itself a
    function of something, and nowhere that `torch.autograd.grad`, given its inputs, does not look. Here what refuses
    depends on all that the gradients do. Nothing is spent unless the pass was started with ``create_graph=True``:
    gradients are switched off in every other.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            saved = ctx.saved_tensors  # once: activation checkpointing does not hand them out again
            with torch.no_grad():
                context = SimpleNamespace(**vars(ctx), saved_tensors=saved, needs_input_grad=ctx.needs_input_grad)
                results = backward(context, *grads)
            found = [result for result in results if result is not None]
            sources = [tensor for tensor in (*grads, *saved) if tensor is not None and tensor.requires_grad]
            refusing = iter(_Refusal.apply(op, len(found), *found, *sources))
            return tuple(None if result is None else next(refusing) for result in results)

        return wrapper

    return decorate
