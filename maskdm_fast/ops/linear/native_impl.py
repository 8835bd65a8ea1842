"""linear on oneDNN's matrix products, which PyTorch carries but calls for float32 only in compiled inference.

`torch.ops.mkldnn._linear_pointwise(x, w, bias)` is ``x w^T + bias``; its other form adds a tensor in the same pass. It
copies a first operand whose rows are not in one piece, slowly, so the backward pass transposes that operand itself
(csrc/linear), the smaller of the two that it could. Other dtypes go to PyTorch's own products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.registration import opaque

if backend.has_native():
    _transpose = torch.ops.maskdm_fast.linear_transpose.default

    @torch.library.register_fake("maskdm_fast::linear_transpose")
    def _transpose_fake(x: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape[1], x.shape[0]), x.new_empty(x.shape[1] if with_sums else 0)


def _product_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# Inductor lowers oneDNN's products by itself, for constant weights alone: a graph gets an operator that it cannot open.
@opaque("linear_product(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor", _product_fake)
def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``x W^T + bias + residual`` by oneDNN."""
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() > 0 and weight.numel() > 0 and backend.has_onednn()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if _by_onednn(x, weight):
        return _product(x, weight, bias, residual)
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, with_x: bool, with_weight: bool, with_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not _by_onednn(grad, weight):
        return (
            grad @ weight if with_x else None,
            grad.t() @ x if with_weight else None,
            grad.sum(0) if with_bias else None,
        )
    grad_x = _product(grad, weight.t(), None, None) if with_x else None
    grad_weight = grad_bias = None
    if with_weight and grad.shape[1] <= x.shape[1]:
        grad_t, sums = _transpose(grad, with_bias)
        grad_bias = sums if with_bias else None
        grad_weight = _product(grad_t, x.t(), None, None)
    elif with_weight:
        x_t, _ = _transpose(x, False)
        grad_weight, _ = _transpose(_product(x_t, grad.t(), None, None), False)
    if with_bias and grad_bias is None:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias
