"""masked_attention: softmax attention among the visible tokens of each image."""

import math
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.autograd import once_differentiable
from maskdm_fast.ops.checks import FLOATING, check_cu_seqlens, check_device, check_dtype, check_number, check_shape
from maskdm_fast.ops.masked_attention import crossover, native_impl, reference, sdpa_impl, xformers_impl

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.masked_attention import triton_impl

    IMPL["triton"] = triton_impl
INTEROP = {"sdpa": sdpa_impl, "xformers": xformers_impl}  # other libraries: `attend`, which brings its own gradient
BACKENDS = IMPL | INTEROP

_OP = "masked_attention"


class _Attention(torch.autograd.Function):
    """Takes qkv whole, so that its gradient is written once and never assembled, or q, k and v."""

    @staticmethod
    def forward(ctx: Any, cu_seqlens: Tensor | None, scale: float, backend: str, *inputs: Tensor) -> Tensor:
        q, k, v = inputs[0].unbind(-3) if len(inputs) == 1 else inputs
        o, lse = IMPL[backend].forward(q, k, v, cu_seqlens, scale)
        ctx.save_for_backward(*inputs, lse, cu_seqlens)
        ctx.scale, ctx.backend = scale, backend
        return o

    @staticmethod
    @once_differentiable(_OP)
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, cu_seqlens = ctx.saved_tensors
        q, k, v = inputs[0].unbind(-3) if len(inputs) == 1 else inputs
        grad_qkv = IMPL[ctx.backend].backward(grad_o, q, k, v, lse, cu_seqlens, ctx.scale)
        return None, None, None, *((grad_qkv,) if len(inputs) == 1 else grad_qkv.unbind(-3))


def masked_attention(
    qkv: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to all tokens of its image, per head: ``softmax(scale q k^T) v``.

    The softmax is computed in float32 (float64 for float64). The backward pass is deterministic, and can itself not be
    differentiated.

    Args:
        qkv: ``[B, K, 3, H, E]``, the view of a packed projection, or q ``[B, K, H, E]`` with `k` and `v` of the same
            shape. With `cu_seqlens` packed: ``[T, 3, H, E]`` or ``[T, H, E]``. float32, float16, bfloat16 or float64,
            any strides.
        k, v: keys and values, given both or neither.
        cu_seqlens: int32 ``[B + 1]``, cumulative token counts of the packed form, from 0 to T.
        scale: factor of the scores; None: ``E ** -0.5``.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"sdpa"`` or ``"xformers"``; None chooses. The
            last two are other libraries' attention, gradients included, whose bits may differ from run to run on CUDA.
            Packed, they read `cu_seqlens` on the host, as the reference does: they wait for the device. On CUDA None
            is ``"sdpa"`` for images of more than 128 tokens each, not packed, and for heads wider than 128.

    Returns:
        ``[B, K, H, E]``, or packed ``[T, H, E]``, contiguous.

    Raises:
        ValueError, TypeError: wrong shape or device; wrong type or dtype.
        RuntimeError: cu_seqlens does not rise from 0 to T (checked on CPU); the named backend cannot run.

    Source: Vaswani et al. (arXiv 1706.03762), eq. 1; the log-sum-exp that the backward pass starts from is
    FlashAttention's (arXiv 2205.14135).
    """
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v are given both, or neither with a packed qkv")
    check_dtype(_OP, "qkv" if k is None else "q", qkv, FLOATING)
    tokens = ("T",) if cu_seqlens is not None else ("B", "K")
    if k is None or v is None:
        check_shape(_OP, "qkv", qkv, *tokens, 3, "H", "E")
        inputs: tuple[Tensor, ...] = (qkv,)
    else:
        check_shape(_OP, "q", qkv, *tokens, "H", "E")
        for name, tensor in (("k", k), ("v", v)):
            check_dtype(_OP, name, tensor, (qkv.dtype,))
            check_device(_OP, name, tensor, qkv.device)
            check_shape(_OP, name, tensor, *qkv.shape)
        inputs = (qkv, k, v)
    if cu_seqlens is not None:
        check_cu_seqlens(_OP, cu_seqlens, qkv.device)
        cu_seqlens = cu_seqlens.contiguous()
    if qkv.shape[-1] == 0:
        raise ValueError(f"{_OP}: {'qkv' if k is None else 'q'} has shape {list(qkv.shape)}, want E at least 1")
    scale = 1.0 / math.sqrt(qkv.shape[-1]) if scale is None else check_number(_OP, "scale", scale)
    chosen = backends.choose(_OP, BACKENDS, qkv, backend)
    if not backends.is_named(BACKENDS, backend) and crossover.hands_over(qkv, cu_seqlens):
        chosen = "sdpa"
    if chosen == "cuda" and qkv.shape[-1] > crossover.MAX_HEAD_DIM:
        reason = f"head width {qkv.shape[-1]} is above {crossover.MAX_HEAD_DIM}"
        raise RuntimeError(f"{_OP}: backend 'cuda' cannot run: {reason}")
    if chosen in INTEROP:
        q, k, v = qkv.unbind(-3) if k is None or v is None else inputs
        with torch.autocast(qkv.device.type, enabled=False):  # which would change the dtype of the result
            return INTEROP[chosen].attend(q, k, v, cu_seqlens, scale)
    return _Attention.apply(cu_seqlens, scale, chosen, *inputs)
