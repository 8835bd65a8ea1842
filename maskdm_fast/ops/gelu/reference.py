"""Ground truth of gelu in plain PyTorch, forward and backward."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast.ops.checks import accumulate_dtype


def forward(x: Tensor) -> Tensor:
    return F.gelu(x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    wide = x.to(accumulate_dtype(x.dtype))
    distribution = 0.5 * torch.erfc(wide * -math.sqrt(0.5))
    density = torch.exp(-0.5 * wide.square()) / math.sqrt(2.0 * math.pi)
    return (grad * (distribution + wide * density)).to(x.dtype)
