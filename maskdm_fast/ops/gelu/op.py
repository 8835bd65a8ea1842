"""gelu: the exact Gaussian error linear unit."""

from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.autograd import once_differentiable
from maskdm_fast.ops.checks import FLOATING, check_dtype
from maskdm_fast.ops.gelu import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl}

_OP = "gelu"


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return IMPL[backend].forward(x)

    @staticmethod
    @once_differentiable(_OP)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return IMPL[ctx.backend].backward(grad.contiguous(), x), None


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``x Phi(x)`` with Phi the standard normal distribution, in float32 or better; ``grad (Phi(x) + x phi(x))`` back.

    Args:
        x: any shape; float32, float16, bfloat16 or float64.
        backend: ``"reference"`` or ``"cpu"``; None chooses.

    Returns:
        Shape and dtype of `x`, contiguous.

    Raises:
        TypeError: wrong type or dtype.
        RuntimeError: the named backend cannot run.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
    """
    check_dtype(_OP, "x", x, FLOATING)
    return _Gelu.apply(x.contiguous(), backends.choose(_OP, IMPL, x, backend))
