"""Ground truth of linear in plain PyTorch, forward and backward, on ``x [M, I]``."""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, with_x: bool, with_weight: bool, with_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        grad @ weight if with_x else None,
        grad.t() @ x if with_weight else None,
        grad.sum(0) if with_bias else None,
    )
