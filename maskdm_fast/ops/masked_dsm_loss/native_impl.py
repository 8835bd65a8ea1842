"""masked_dsm_loss on the compiled kernels of csrc/masked_dsm_loss."""

import torch
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.checks import accumulate_dtype

_KIND = {"mse": 0, "l1": 1, "huber": 2}

if backend.has_native():
    _forward = torch.ops.maskdm_fast.masked_dsm_loss_fwd.default

    @torch.library.register_fake("maskdm_fast::masked_dsm_loss_fwd")
    def _fake(
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        cu_seqlens: Tensor | None,
        kind: int,
        delta: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        num_images = pred.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        raw = pred.new_empty(num_images, dtype=accumulate_dtype(pred.dtype))
        return raw, torch.empty_like(pred) if with_grad else pred.new_empty(0)


def forward(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    delta: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    if weight is not None:
        weight = weight.contiguous()
    return _forward(pred.contiguous(), target.contiguous(), weight, cu_seqlens, _KIND[kind], delta, with_grad)
