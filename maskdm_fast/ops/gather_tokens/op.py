"""gather_tokens and scatter_tokens: visible tokens out of all tokens, and back."""

from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.autograd import once_differentiable
from maskdm_fast.ops.checks import FLOATING, check_cu_seqlens, check_device, check_dtype, check_int, check_shape
from maskdm_fast.ops.gather_tokens import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.gather_tokens import triton_impl

    IMPL["triton"] = triton_impl


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(ids_keep, cu_seqlens)
        ctx.num_tokens, ctx.backend = x.shape[1], backend
        return IMPL[backend].gather(x, ids_keep, cu_seqlens)

    @staticmethod
    @once_differentiable("gather_tokens")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids_keep, cu_seqlens = ctx.saved_tensors
        return IMPL[ctx.backend].scatter(grad, ids_keep, None, cu_seqlens, ctx.num_tokens), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids_keep: Tensor,
        base: Tensor | None,
        cu_seqlens: Tensor | None,
        num_tokens: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(ids_keep, cu_seqlens)
        ctx.backend = backend
        return IMPL[backend].scatter(x, ids_keep, base, cu_seqlens, num_tokens)

    @staticmethod
    @once_differentiable("scatter_tokens")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids_keep, cu_seqlens = ctx.saved_tensors
        to_x, _, to_base = ctx.needs_input_grad[:3]
        grad_x, grad_base = IMPL[ctx.backend].split(grad, ids_keep, cu_seqlens, to_x, to_base)
        return grad_x if to_x else None, None, grad_base if to_base else None, None, None, None


def _checked_ids(
    op: str, ids_keep: Tensor, cu_seqlens: Tensor | None, device: torch.device, num_images: int
) -> tuple[Tensor, Tensor | None]:
    """`ids_keep` and `cu_seqlens`, checked and contiguous."""
    check_dtype(op, "ids_keep", ids_keep, (torch.int64,))
    check_device(op, "ids_keep", ids_keep, device)
    if cu_seqlens is None:
        check_shape(op, "ids_keep", ids_keep, num_images, "K")
    else:
        check_cu_seqlens(op, cu_seqlens, device)
        check_shape(op, "ids_keep", ids_keep, "T")
        if cu_seqlens.shape[0] != num_images + 1:
            raise ValueError(f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, want [{num_images + 1}]")
        cu_seqlens = cu_seqlens.contiguous()
    return ids_keep.contiguous(), cu_seqlens


def gather_tokens(
    x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """The tokens that `ids_keep` names: ``out[b, k] = x[b, ids_keep[b, k]]``.

    Packed, with ``cu_seqlens``: ``out[t] = x[b, ids_keep[t]]`` for ``cu_seqlens[b] <= t < cu_seqlens[b + 1]``.
    The backward pass is `scatter_tokens` onto zeros.

    Args:
        x: ``[B, N, D]``, float32, float16, bfloat16 or float64, any strides.
        ids_keep: int64 ``[B, K]``, or packed ``[T]``; ``0 <= id < N``, distinct within an image.
        cu_seqlens: int32 ``[B + 1]``, cumulative counts of the packed form, from 0 to T.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        ``[B, K, D]``, or packed ``[T, D]``.

    Raises:
        ValueError, TypeError: wrong shape or device; wrong type or dtype.
        RuntimeError: an id out of range or twice in an image (checked on CPU); the named backend cannot run.

    Source: MAE (arXiv 2111.06377) and MaskDM (arXiv 2306.11363) keep visible tokens so; their codes index with a
    boolean mask or with an int64 index as large as the output.
    """
    op = "gather_tokens"
    check_dtype(op, "x", x, FLOATING)
    check_shape(op, "x", x, "B", "N", "D")
    ids_keep, cu_seqlens = _checked_ids(op, ids_keep, cu_seqlens, x.device, x.shape[0])
    return _Gather.apply(x, ids_keep, cu_seqlens, backends.choose(op, IMPL, x, backend))


def scatter_tokens(
    x: Tensor,
    ids_keep: Tensor,
    num_tokens: int,
    base: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Put tokens back: ``out[b, ids_keep[b, k]] = x[b, k]``, and ``base[b, n]`` (or 0) at every other place.

    The backward pass to `x` is `gather_tokens`; to `base` it is the gradient with the rows of `ids_keep` zeroed.

    Args:
        x: ``[B, K, D]``, or packed ``[T, D]``, float32, float16, bfloat16 or float64.
        ids_keep: int64 ``[B, K]`` or ``[T]``; ``0 <= id < num_tokens``, distinct within an image.
        num_tokens: N, at least 1.
        base: ``[B, N, D]`` of the dtype of `x`, e.g. the hidden states that TREAD or SPRINT routed around; None: zeros.
        cu_seqlens: int32 ``[B + 1]`` of the packed form.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        ``[B, N, D]``.

    Raises:
        ValueError, TypeError, RuntimeError: as `gather_tokens`.

    Source: the inverse of `gather_tokens`; TREAD (arXiv 2501.04765), SPRINT (arXiv 2510.21986).
    """
    op = "scatter_tokens"
    check_dtype(op, "x", x, FLOATING)
    if cu_seqlens is None:
        check_shape(op, "x", x, "B", "K", "D")
        num_images = x.shape[0]
    else:
        check_shape(op, "x", x, "T", "D")
        check_cu_seqlens(op, cu_seqlens, x.device)
        num_images = cu_seqlens.shape[0] - 1
    ids_keep, cu_seqlens = _checked_ids(op, ids_keep, cu_seqlens, x.device, num_images)
    if ids_keep.shape[-1] != x.shape[-2]:
        raise ValueError(f"{op}: ids_keep has shape {list(ids_keep.shape)}, want {list(x.shape[:-1])}")
    check_int(op, "num_tokens", num_tokens)
    if num_tokens < 1:
        raise ValueError(f"{op}: num_tokens is {num_tokens}, want at least 1")
    if base is not None:
        check_dtype(op, "base", base, (x.dtype,))
        check_device(op, "base", base, x.device)
        check_shape(op, "base", base, num_images, num_tokens, x.shape[-1])
    chosen = backends.choose(op, IMPL, x, backend)
    return _Scatter.apply(x, ids_keep, base, cu_seqlens, num_tokens, chosen)
