"""linear: ``x W^T + b``, plus a residual, on the fastest matrix products that PyTorch carries."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.autograd import once_differentiable
from maskdm_fast.ops.checks import FLOATING, check_device, check_dtype, check_shape
from maskdm_fast.ops.linear import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl}

_OP = "linear"


def _by_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """By PyTorch's own products, which autograd and autocast know."""
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is not None:
        return F.linear(x, weight, bias) + residual
    # The product accumulates into a copy of the residual, which is less traffic than an addition after it.
    out = torch.addmm(residual.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1]), weight.t())
    return out.view(residual.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str
    ) -> Tensor:
        # Only the gradient of the weight reads x, so that a frozen weight keeps none of it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.backend = backend
        flat = None if residual is None else residual.reshape(-1, weight.shape[0])
        bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its stride
        out = IMPL[backend].forward(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, flat)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable(_OP)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with_x, with_weight, with_bias, with_residual, _ = ctx.needs_input_grad
        flat = grad.reshape(-1, weight.shape[0]).contiguous()
        rows = None if x is None else x.reshape(-1, x.shape[-1]).contiguous()
        grad_x, grad_weight, grad_bias = IMPL[ctx.backend].backward(flat, rows, weight, with_x, with_weight, with_bias)
        return (
            None if grad_x is None else grad_x.view(*grad.shape[:-1], weight.shape[1]),
            grad_weight,
            grad_bias,
            grad if with_residual else None,
            None,
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + b + residual``.

    Nothing here multiplies better than a library does; what is chosen is the library. Where it runs by itself is
    `backend.onednn_is_faster`: float32 on a processor with AVX-512 that MKL does not use, as on AMD's, oneDNN takes
    half the time of `torch.mm` (docs/kernels.md). Elsewhere, and under autocast, this is `F.linear` and an addition.

    Args:
        x: ``[..., I]``; float32, float16, bfloat16 or float64.
        weight: ``[O, I]``, dtype of `x` (any under autocast).
        bias: ``[O]``, or None.
        residual: ``[..., O]`` to be added, or None.
        backend: ``"reference"`` or ``"cpu"``; None chooses.

    Returns:
        ``[..., O]``.

    Raises:
        ValueError, TypeError: wrong shape or device; wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked of ``"cpu"`` or a named backend.
    """
    check_dtype(_OP, "x", x, FLOATING)
    # The meta device, on which networks are counted, has no autocast, and asking about it is an error.
    if backend is None and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return _by_pytorch(x, weight, bias, residual)
    check_dtype(_OP, "weight", weight, (x.dtype,))
    check_device(_OP, "weight", weight, x.device)
    check_shape(_OP, "weight", weight, "O", "I")
    if x.dim() == 0:
        raise ValueError(f"{_OP}: x has shape [], want [..., {weight.shape[1]}]")
    check_shape(_OP, "x", x, *x.shape[:-1], weight.shape[1])
    wanted = (("bias", bias, weight.shape[:1]), ("residual", residual, (*x.shape[:-1], weight.shape[0])))
    for name, tensor, shape in wanted:
        if tensor is not None:
            check_dtype(_OP, name, tensor, (x.dtype,))
            check_device(_OP, name, tensor, x.device)
            check_shape(_OP, name, tensor, *shape)
    chosen = backends.choose(_OP, IMPL, x, backend)
    by_itself = chosen == "cpu" and backends.onednn_is_faster(x.dtype)
    if not by_itself and not backends.is_named(IMPL, backend):
        return _by_pytorch(x, weight, bias, residual)
    return _Linear.apply(x, weight, bias, residual, chosen)
