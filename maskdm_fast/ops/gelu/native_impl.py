"""gelu on the compiled kernels of csrc/gelu."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend

if backend.has_native():
    _forward = torch.ops.maskdm_fast.gelu_fwd.default
    _backward = torch.ops.maskdm_fast.gelu_bwd.default

    @torch.library.register_fake("maskdm_fast::gelu_fwd")
    def _forward_fake(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("maskdm_fast::gelu_bwd")
    def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x)


def forward(x: Tensor) -> Tensor:
    return _forward(x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    return _backward(grad, x)
