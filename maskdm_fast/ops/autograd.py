"""What the autograd functions of the ops share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _once_differentiable


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of this name: a second derivative raises RuntimeError. Free where none is asked for.

    The backward pass runs with gradients switched off unless it was started with ``create_graph=True``; torch's
    decorator switches them off again, which takes as long as one of our small kernels.
    """
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper
