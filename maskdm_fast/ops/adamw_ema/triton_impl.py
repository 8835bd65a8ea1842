"""adamw_ema and the global norm as Triton kernels; csrc/adamw_ema computes the same.

    g = grad_scale grad,    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps),    ema += (1 - ema_decay) (p - ema)
    copy = p rounded;    nothing of it where found_inf is not 0

One launch updates all tensors of one pair of dtypes (parameter and copy); a program takes a chunk of _CHUNK values of
one tensor (triton_adam.py). The norm is taken alike: float32 sums of squares of chunks, which a single program adds in
float64, in a fixed order.

Bytes, float32: p, g, m, v, ema read, p, m, v, ema written, 36 a parameter, 8 less without m (which is g then) and 8
without ema; the norm 4. About 15 FLOPs.

Must hold: tensors contiguous. Bases that are not multiples of 16 bytes are served by a launch of their own, with
narrower accesses. float64 tensors go to the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema import fakes, reference
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
_NORM_CHUNK, _NORM_BLOCK, _SUMS = 8192, 2048, 4096


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, start, end, scale, decay, beta1, follow1, beta2, follow2,
    step_size, inverse_bias2_sqrt, eps, follow_ema, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of values; MASKED where it may reach past the end, which costs the wide accesses."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < end if MASKED else None
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32) * scale
    m = g
    if m_ptr is not None:
        m = beta1 * tl.load(m_ptr + offs, mask=mask) + follow1 * g
    v = beta2 * tl.load(v_ptr + offs, mask=mask) + follow2 * (g * g)
    p = tl.load(p_ptr + offs, mask=mask).to(tl.float32) * decay
    p -= step_size * (m / (tl.sqrt(v) * inverse_bias2_sqrt + eps))
    # Every load stands before the first store, which the compiler would not let it pass.
    if ema_ptr is not None:
        ema = tl.load(ema_ptr + offs, mask=mask)
        ema += follow_ema * (p - ema)
    if m_ptr is not None:
        tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)
    if ema_ptr is not None:
        tl.store(ema_ptr + offs, ema, mask=mask)
    rounded = p.to(p_ptr.dtype.element_ty)
    tl.store(p_ptr + offs, rounded, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, rounded.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step_kernel(
    table_ptr,  # rows: p, g, v, m, ema and copy (where they are there), counts, chunks
    grad_scale_ptr,
    lr_ptr,  # it and the next two are None where the value is given
    step_ptr,
    ema_decay_ptr,
    found_inf_ptr,  # or None: 0
    num_tensors: tl.int32,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    bias1: tl.float64,
    bias2_sqrt: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    ema_decay: tl.float64,
    DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    FIRST_MOMENT: tl.constexpr,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lr = number_of(lr_ptr, lr)
    scale, beta1, follow1, beta2, follow2 = rates_of(grad_scale_ptr, beta1, beta2)
    bias1, inverse_bias2_sqrt = biases_of(step_ptr, log_beta1, log_beta2, bias1, bias2_sqrt)
    follow_ema = tl.full((), 1.0 - number_of(ema_decay_ptr, ema_decay), tl.float32)
    decay = tl.full((), 1.0 - lr * weight_decay, tl.float32)
    step_size = tl.full((), lr, tl.float32) / bias1
    eps = tl.full((), eps, tl.float32)

    EMA: tl.constexpr = 4 if FIRST_MOMENT else 3
    COPY: tl.constexpr = EMA + 1 if AVERAGE else EMA
    COUNTS: tl.constexpr = COPY if COPY_DTYPE is None else COPY + 1
    tensor, first, last = chunk_of(table_ptr, COUNTS, num_tensors, found_inf_ptr, CHUNK)
    p_ptr = pointer_of(table_ptr, 0, num_tensors, tensor, DTYPE, ALIGNED)
    g_ptr = pointer_of(table_ptr, 1, num_tensors, tensor, DTYPE, ALIGNED)
    v_ptr = pointer_of(table_ptr, 2, num_tensors, tensor, tl.float32, ALIGNED)
    m_ptr = pointer_of(table_ptr, 3, num_tensors, tensor, tl.float32, ALIGNED) if FIRST_MOMENT else None
    ema_ptr = pointer_of(table_ptr, EMA, num_tensors, tensor, tl.float32, ALIGNED) if AVERAGE else None
    copy_ptr = None if COPY_DTYPE is None else pointer_of(table_ptr, COPY, num_tensors, tensor, COPY_DTYPE, ALIGNED)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, start, last, scale, decay, beta1, follow1, beta2, follow2,
            step_size, inverse_bias2_sqrt, eps, follow_ema, BLOCK, False,
        )  # fmt: skip
    if whole < last:
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, whole, last, scale, decay, beta1, follow1, beta2, follow2,
            step_size, inverse_bias2_sqrt, eps, follow_ema, BLOCK, True,
        )  # fmt: skip


@triton.jit
def _squares_kernel(
    table_ptr,  # rows: addresses, counts, chunks
    sums_ptr,
    num_tensors: tl.int32,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, last = chunk_of(table_ptr, 1, num_tensors, None, CHUNK)
    x_ptr = pointer_of(table_ptr, 0, num_tensors, tensor, DTYPE, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
        total += x * x
    if whole < last:
        offs = whole + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < last, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _norm_kernel(sums_ptr, norm_ptr, num_sums: tl.int32, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_sums, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + offs, mask=offs < num_sums, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total)).to(tl.float32))


@opaque("global_norm_triton(Tensor[] tensors) -> Tensor", fakes.global_norm)
def global_norm(tensors: list[Tensor]) -> Tensor:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return reference.global_norm(tensors)
    tensors = [tensor.contiguous() for tensor in tensors]
    launches = list(groups_of("global_norm", [tensors], (0,), _NORM_CHUNK))
    num_sums = sum(launch.num_chunks for launch in launches)
    sums, norm = tensors[0].new_empty(num_sums, dtype=torch.float32), tensors[0].new_empty((), dtype=torch.float32)
    begin = 0
    with backend.current_device_of(norm):
        for group in launches:
            if group.num_chunks > 0:
                _squares_kernel[(group.num_chunks,)](
                    group.table, sums[begin:], len(group.members), DTYPE=triton_dtype(group.dtypes[0]),
                    ALIGNED=group.aligned, CHUNK=_NORM_CHUNK, BLOCK=_NORM_BLOCK,
                )  # fmt: skip
            begin += group.num_chunks
        _norm_kernel[(1,)](sums, norm, num_sums, BLOCK=_SUMS, num_warps=8)
    return norm


@opaque(
    "adamw_ema_triton_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step, float ema_decay, Tensor? lr_tensor, Tensor? step_tensor, "
    "Tensor? ema_decay_tensor, Tensor? found_inf) -> ()",
    fakes.adamw_ema_,
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
    lr_tensor: Tensor | None,
    step_tensor: Tensor | None,
    ema_decay_tensor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    lists = [params, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, emas, copies]
    p, g, m, v, ema, copy = lists
    present = [tensors for tensors in (p, g, v, m, ema, copy) if tensors]
    for group in groups_of("adamw_ema", present, (0, len(present) - 1) if copies else (0,), _CHUNK):
        if group.table is None:
            parts = [[tensors[i] for i in group.members] if tensors else [] for tensors in lists]
            reference.step_(
                *parts, grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay, lr_tensor, step_tensor,
                ema_decay_tensor, found_inf,
            )  # fmt: skip
        elif group.num_chunks > 0:
            with backend.current_device_of(params[0]):
                _step_kernel[(group.num_chunks,)](
                    group.table, grad_scale, lr_tensor, step_tensor, ema_decay_tensor, found_inf, len(group.members),
                    lr, beta1, beta2, *bias_arguments(beta1, beta2, step), eps, weight_decay, ema_decay,
                    DTYPE=triton_dtype(group.dtypes[0]), COPY_DTYPE=triton_dtype(group.dtypes[1]) if copies else None,
                    FIRST_MOMENT=bool(exp_avgs), AVERAGE=bool(emas), ALIGNED=group.aligned, CHUNK=_CHUNK, BLOCK=_BLOCK,
                )  # fmt: skip
