"""The parts of a U-ViT. None of them draws its own initial weights: `UViT.reset_parameters` fills them statelessly.

The residual stream has the compute dtype: the autocast dtype under `torch.autocast`, else the dtype of the parameters.
Everything that joins it (time token, position rows) is cast to it, and every block keeps it. What needs float32 has it
inside: the time angles, the statistics of the norms, the softmax.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm_fast import ops


class Linear(nn.Linear):
    """`nn.Linear` that leaves its memory empty on construction, so that torch's global generator is not consumed."""

    def reset_parameters(self) -> None:
        """Do nothing: the model owns the initial values."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x W^T + b + residual``."""
        return ops.linear(x, self.weight, self.bias, residual=residual)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that returns the dtype of its input under autocast too.

    CUDA autocast would return float32 and cost one more pass to cast it for the Linear that follows. The kernels
    compute mean and variance in float32 whatever the input is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SkipLinear(nn.Module):
    """``cat([x, skip], -1) @ cat([weight_x, weight_skip], -1).T + bias`` without forming either concatenation.

    The second product adds the output of the first; with two separate weights the backward neither splits nor joins.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight_x = nn.Parameter(torch.empty(dim, dim))
        self.weight_skip = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join two ``[B, K, D]`` or packed ``[T, D]`` tensors into one."""
        return ops.linear(skip, self.weight_skip, residual=ops.linear(x, self.weight_x, self.bias))


class Attention(nn.Module):
    """Residual plus self-attention over the tokens that are there; the op reads the packed qkv (3, H, E) in place."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, residual: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, K, 3, H, E]
        return self.proj(ops.masked_attention(qkv, cu_seqlens=cu_seqlens).flatten(-2), residual)


class MLP(nn.Module):
    """Residual plus ``Linear(D, hidden)``, exact GELU, ``Linear(hidden, D)``."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x)), residual)


class Block(nn.Module):
    """Pre-norm transformer block: ``x += attention(norm1(x)); x += mlp(norm2(x))``, after a long skip if it has one."""

    def __init__(self, dim: int, num_heads: int, hidden: int, *, qkv_bias: bool, skip: bool):
        super().__init__()
        self.skip = SkipLinear(dim) if skip else None
        self.norm1 = LayerNorm(dim)
        self.attention = Attention(dim, num_heads, qkv_bias)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor, skip: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Map ``[B, K, D]`` to ``[B, K, D]``; `skip` of the same shape goes to the blocks built with ``skip=True``.

        Packed, ``[T, D]`` to ``[T, D]``, the tokens of image b being those from ``cu_seqlens[b]`` on.
        """
        if self.skip is not None:
            x = self.skip(x, skip)
        x = self.attention(self.norm1(x), x, cu_seqlens)
        return self.mlp(self.norm2(x), x)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """``[cos(t f_0), ..., sin(t f_0), ...]`` with ``f_i = exp(-ln(10000) i / (dim/2))``.

    Args:
        t: ``[B]``, integer or floating, 0..T-1.
        dim: even width.

    Returns:
        float32 ``[B, dim]``: half precision would not hold the angles of t = 999.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020; order as in U-ViT.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000.0) / half))
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
