"""gather_tokens and scatter_tokens on the compiled kernels of csrc/gather_tokens."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend

if backend.has_native():
    _gather = torch.ops.maskdm_fast.gather_tokens_fwd.default
    _scatter = torch.ops.maskdm_fast.scatter_tokens_fwd.default
    _split = torch.ops.maskdm_fast.scatter_tokens_bwd.default

    @torch.library.register_fake("maskdm_fast::gather_tokens_fwd")
    def _gather_fake(x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return x.new_empty(*ids_keep.shape, x.shape[2])

    @torch.library.register_fake("maskdm_fast::scatter_tokens_fwd")
    def _scatter_fake(
        x: Tensor, ids_keep: Tensor, base: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int
    ) -> Tensor:
        num_images = ids_keep.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return x.new_empty(num_images, num_tokens, x.shape[-1])

    @torch.library.register_fake("maskdm_fast::scatter_tokens_bwd")
    def _split_fake(
        grad: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None, to_x: bool, to_base: bool
    ) -> tuple[Tensor, Tensor]:
        grad_x = grad.new_empty(*ids_keep.shape, grad.shape[2]) if to_x else grad.new_empty(0)
        return grad_x, grad.new_empty(grad.shape) if to_base else grad.new_empty(0)


def gather(x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return _gather(x if x.stride(-1) == 1 else x.contiguous(), ids_keep, cu_seqlens)


def scatter(x: Tensor, ids_keep: Tensor, base: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int) -> Tensor:
    if base is not None and base.stride(-1) != 1:
        base = base.contiguous()
    return _scatter(x.contiguous(), ids_keep, base, cu_seqlens, num_tokens)


def split(
    grad: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None, to_x: bool, to_base: bool
) -> tuple[Tensor, Tensor]:
    return _split(grad if grad.stride(-1) == 1 else grad.contiguous(), ids_keep, cu_seqlens, to_x, to_base)
