"""lamb_ema as Triton kernels; csrc/lamb_ema computes the same.

    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2,    g = grad_scale grad
    r = m_hat / (sqrt(v_hat) + eps) + weight_decay p,    trust = |p| / |r| or 1
    p = p - lr trust r,    ema += (1 - ema_decay) (p - ema),    copy = p rounded
    nothing of it where found_inf is not 0

Three launches update all tensors of one pair of dtypes (parameter and copy). In the first a program updates m and v of
a chunk of _CHUNK values of one tensor (triton_adam.py) and writes the chunk's sums of the squares of p and r, in
float32; in the second a program adds those of one tensor in float64, in a fixed order, and writes its trust ratio; in
the third a program computes r of a chunk once more and updates p, ema and copy.

Bytes, float32: p, g, m, v read, m, v written, 24 a parameter; p, m, v, ema read, p, ema written, 24. About 35 FLOPs.

Must hold: as for adamw_ema; the squares of parameters are within the range of float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.lamb_ema import fakes, reference
from maskdm_fast.ops.registration import opaque
from maskdm_fast.ops.triton_adam import (
    bias_arguments,
    biases_of,
    chunk_of,
    groups_of,
    number_of,
    pointer_of,
    rates_of,
    triton_dtype,
)

_CHUNK, _BLOCK = 4096, 512  # values of a program, and at a time: 4 a thread, 16 bytes of float32
_SUMS = 256  # chunks of a tensor that are added at a time


@triton.jit
def _update_of(p, m, v, inverse_bias1, inverse_bias2_sqrt, eps, weight_decay):
    """r; computed by the first and the third launch alike."""
    return m * inverse_bias1 / (tl.sqrt(v) * inverse_bias2_sqrt + eps) + weight_decay * p


@triton.jit
def _moments(
    p_ptr, g_ptr, m_ptr, v_ptr, start, end, scale, beta1, follow1, beta2, follow2, inverse_bias1, inverse_bias2_sqrt,
    eps, weight_decay, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of values: the squares of p and r; MASKED as in adamw_ema."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < end if MASKED else None
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32) * scale
    m = beta1 * tl.load(m_ptr + offs, mask=mask) + follow1 * g
    v = beta2 * tl.load(v_ptr + offs, mask=mask) + follow2 * (g * g)
    p = tl.load(p_ptr + offs, mask=mask).to(tl.float32)
    r = _update_of(p, m, v, inverse_bias1, inverse_bias2_sqrt, eps, weight_decay)
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)
    if MASKED:
        p, r = tl.where(mask, p, 0.0), tl.where(mask, r, 0.0)
    return p * p, r * r


@triton.jit
def _moments_kernel(
    table_ptr,  # rows: p, g, m, v, ema, copy (where there is one), adapted, counts, chunks
    sums_ptr,  # two a chunk
    grad_scale_ptr,
    step_ptr,  # or None: the biases are given
    found_inf_ptr,  # or None: 0
    num_tensors: tl.int32,
    beta1: tl.float64,
    beta2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    bias1: tl.float64,
    bias2_sqrt: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale, beta1, follow1, beta2, follow2 = rates_of(grad_scale_ptr, beta1, beta2)
    bias1, inverse_bias2_sqrt = biases_of(step_ptr, log_beta1, log_beta2, bias1, bias2_sqrt)
    inverse_bias1 = 1.0 / bias1
    eps, weight_decay = tl.full((), eps, tl.float32), tl.full((), weight_decay, tl.float32)

    COUNTS: tl.constexpr = 6 if COPY_DTYPE is None else 7
    tensor, first, last = chunk_of(table_ptr, COUNTS, num_tensors, found_inf_ptr, CHUNK)
    p_ptr = pointer_of(table_ptr, 0, num_tensors, tensor, DTYPE, ALIGNED)
    g_ptr = pointer_of(table_ptr, 1, num_tensors, tensor, DTYPE, ALIGNED)
    m_ptr = pointer_of(table_ptr, 2, num_tensors, tensor, tl.float32, ALIGNED)
    v_ptr = pointer_of(table_ptr, 3, num_tensors, tensor, tl.float32, ALIGNED)
    of_p, of_r = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        p2, r2 = _moments(
            p_ptr, g_ptr, m_ptr, v_ptr, start, last, scale, beta1, follow1, beta2, follow2, inverse_bias1,
            inverse_bias2_sqrt, eps, weight_decay, BLOCK, False,
        )  # fmt: skip
        of_p += p2
        of_r += r2
    if whole < last:
        p2, r2 = _moments(
            p_ptr, g_ptr, m_ptr, v_ptr, whole, last, scale, beta1, follow1, beta2, follow2, inverse_bias1,
            inverse_bias2_sqrt, eps, weight_decay, BLOCK, True,
        )  # fmt: skip
        of_p += p2
        of_r += r2
    tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(of_p))
    tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(of_r))


@triton.jit
def _trust_kernel(table_ptr, sums_ptr, trust_ptr, counts_row, num_tensors: tl.int32, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    chunks_ptr = table_ptr + (counts_row + 1) * num_tensors + tensor
    of_p, of_r = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    last = tl.load(chunks_ptr + 1)
    for start in range(tl.load(chunks_ptr), last, BLOCK):
        chunks = start + tl.arange(0, BLOCK)
        of_p += tl.load(sums_ptr + 2 * chunks, mask=chunks < last, other=0.0).to(tl.float64)
        of_r += tl.load(sums_ptr + 2 * chunks + 1, mask=chunks < last, other=0.0).to(tl.float64)
    p_norm, r_norm = tl.sqrt(tl.sum(of_p)).to(tl.float32), tl.sqrt(tl.sum(of_r)).to(tl.float32)
    adapted = tl.load(table_ptr + (counts_row - 1) * num_tensors + tensor) != 0
    trust = tl.where(adapted & (p_norm != 0) & (r_norm != 0), p_norm / r_norm, 1.0)
    tl.store(trust_ptr + tensor, trust)


@triton.jit
def _apply(
    p_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, start, end, rate, inverse_bias1, inverse_bias2_sqrt, eps, weight_decay,
    follow_ema, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of values."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < end if MASKED else None
    m, v, ema = tl.load(m_ptr + offs, mask=mask), tl.load(v_ptr + offs, mask=mask), tl.load(ema_ptr + offs, mask=mask)
    p = tl.load(p_ptr + offs, mask=mask).to(tl.float32)
    p -= rate * _update_of(p, m, v, inverse_bias1, inverse_bias2_sqrt, eps, weight_decay)
    tl.store(ema_ptr + offs, ema + follow_ema * (p - ema), mask=mask)
    rounded = p.to(p_ptr.dtype.element_ty)
    tl.store(p_ptr + offs, rounded, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, rounded.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _apply_kernel(
    table_ptr,  # as in _moments_kernel
    trust_ptr,
    step_ptr,
    lr_ptr,  # it and the next are None where the value is given
    ema_decay_ptr,
    found_inf_ptr,
    num_tensors: tl.int32,
    lr: tl.float64,
    ema_decay: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    bias1: tl.float64,
    bias2_sqrt: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bias1, inverse_bias2_sqrt = biases_of(step_ptr, log_beta1, log_beta2, bias1, bias2_sqrt)
    follow_ema = tl.full((), 1.0 - number_of(ema_decay_ptr, ema_decay), tl.float32)
    inverse_bias1 = 1.0 / bias1
    eps, weight_decay = tl.full((), eps, tl.float32), tl.full((), weight_decay, tl.float32)

    COUNTS: tl.constexpr = 6 if COPY_DTYPE is None else 7
    tensor, first, last = chunk_of(table_ptr, COUNTS, num_tensors, found_inf_ptr, CHUNK)
    rate = tl.full((), number_of(lr_ptr, lr), tl.float32) * tl.load(trust_ptr + tensor)
    p_ptr = pointer_of(table_ptr, 0, num_tensors, tensor, DTYPE, ALIGNED)
    m_ptr = pointer_of(table_ptr, 2, num_tensors, tensor, tl.float32, ALIGNED)
    v_ptr = pointer_of(table_ptr, 3, num_tensors, tensor, tl.float32, ALIGNED)
    ema_ptr = pointer_of(table_ptr, 4, num_tensors, tensor, tl.float32, ALIGNED)
    copy_ptr = None if COPY_DTYPE is None else pointer_of(table_ptr, 5, num_tensors, tensor, COPY_DTYPE, ALIGNED)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        _apply(
            p_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, start, last, rate, inverse_bias1, inverse_bias2_sqrt, eps,
            weight_decay, follow_ema, BLOCK, False,
        )  # fmt: skip
    if whole < last:
        _apply(
            p_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, whole, last, rate, inverse_bias1, inverse_bias2_sqrt, eps,
            weight_decay, follow_ema, BLOCK, True,
        )  # fmt: skip


@opaque(
    "lamb_ema_triton_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step, float ema_decay, int min_ndim, Tensor? lr_tensor, Tensor? step_tensor, "
    "Tensor? ema_decay_tensor, Tensor? found_inf) -> ()",
    fakes.lamb_ema_,
)
def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
    min_ndim: int,
    lr_tensor: Tensor | None,
    step_tensor: Tensor | None,
    ema_decay_tensor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lists = [params, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, emas]
    if copies:
        lists.append(copies)
    adapted = [int(param.dim() >= min_ndim) for param in params]
    for group in groups_of("lamb_ema", lists, (0, 5) if copies else (0,), _CHUNK, adapted):
        if group.table is None:
            parts = [[tensors[i] for i in group.members] for tensors in lists]
            reference.step_(
                *parts, *([] if copies else [[]]), grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay,
                min_ndim, lr_tensor, step_tensor, ema_decay_tensor, found_inf,
            )  # fmt: skip
        elif group.num_chunks > 0:
            num_tensors = len(group.members)
            sums = params[0].new_empty(2 * group.num_chunks, dtype=torch.float32)
            trust = params[0].new_empty(num_tensors, dtype=torch.float32)
            same = (*bias_arguments(beta1, beta2, step), eps, weight_decay)
            constants = {
                "DTYPE": triton_dtype(group.dtypes[0]),
                "COPY_DTYPE": triton_dtype(group.dtypes[1]) if copies else None,
                "ALIGNED": group.aligned,
                "CHUNK": _CHUNK,
                "BLOCK": _BLOCK,
            }
            with backend.current_device_of(params[0]):
                _moments_kernel[(group.num_chunks,)](
                    group.table, sums, grad_scale, step_tensor, found_inf, num_tensors, beta1, beta2, *same, **constants
                )
                _trust_kernel[(num_tensors,)](group.table, sums, trust, len(lists) + 1, num_tensors, BLOCK=_SUMS)
                _apply_kernel[(group.num_chunks,)](
                    group.table, trust, step_tensor, lr_tensor, ema_decay_tensor, found_inf, num_tensors, lr, ema_decay,
                    *same, **constants,
                )  # fmt: skip
