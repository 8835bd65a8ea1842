"""Ground truth of masked_attention in plain PyTorch, forward and backward."""

import itertools

import torch
from torch import Tensor

from maskdm_fast.ops.checks import accumulate_dtype, check_segments


def _segments(q: Tensor, cu_seqlens: Tensor | None) -> list[slice | int]:
    """Index of each group of tokens that attend to one another: the images of the packed form, or the whole batch."""
    if cu_seqlens is None:
        return [slice(None)]
    check_segments("masked_attention", cu_seqlens, q.shape[0])
    bounds = cu_seqlens.tolist()
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def _probabilities(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("...ihe,...jhe->...hij", q, k) * scale  # [..., H, L, L]
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp(), lse.transpose(-1, -2)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q.dtype)
    o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:-1], dtype=dtype)
    for rows in _segments(q, cu_seqlens):
        p, lse[rows] = _probabilities(q[rows].to(dtype), k[rows].to(dtype), scale)
        o[rows] = torch.einsum("...hij,...jhe->...ihe", p, v[rows].to(dtype)).to(q.dtype)
    return o, lse


def backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    dtype = accumulate_dtype(q.dtype)
    grad_qkv = q.new_empty(*q.shape[:-2], 3, *q.shape[-2:])
    for rows in _segments(q, cu_seqlens):
        q_, k_, v_, grad_o_ = [x[rows].to(dtype) for x in (q, k, v, grad_o)]
        p, _ = _probabilities(q_, k_, scale)
        grad_p = torch.einsum("...ihe,...jhe->...hij", grad_o_, v_)
        grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
        grad_q = torch.einsum("...hij,...jhe->...ihe", grad_s, k_)
        grad_k = torch.einsum("...hij,...ihe->...jhe", grad_s, q_)
        grad_v = torch.einsum("...hij,...ihe->...jhe", p, grad_o_)
        grad_qkv[rows] = torch.stack((grad_q, grad_k, grad_v), dim=-3).to(q.dtype)
    return grad_qkv
