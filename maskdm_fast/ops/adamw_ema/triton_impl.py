"""adamw_ema and the global norm as Triton kernels; csrc/adamw_ema computes the same.

    g = grad_scale grad,    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps),    ema += (1 - ema_decay) (p - ema)
    copy = p rounded;    nothing of it where found_inf is not 0

One launch updates all tensors of one pair of dtypes (parameter and copy). Their addresses and sizes lie in a table on
the device. A program takes a chunk of _CHUNK values of one tensor, which it finds by binary search. The norm is taken
alike: float32 sums of squares of chunks, which a single program adds in float64, in a fixed order.

Bytes, float32: p, g, m, v, ema read, p, m, v, ema written, 36 a parameter; the norm 4. About 15 FLOPs. Tables have at
most 64 bytes a tensor; they are kept and only uploaded when an address changes, which in a CUDA graph it must not after
the warm-up.

Must hold: tensors contiguous. Bases that are not multiples of 16 bytes are served by a launch of their own, with
narrower accesses. float64 tensors go to the reference.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema import fakes, reference
from maskdm_fast.ops.registration import opaque
from maskdm_fast.ops.triton_impl import image_of

_CHUNK, _BLOCK = 4096, 512  # values of a program, and at a time: 4 a thread, 16 bytes of float32
_NORM_CHUNK, _NORM_BLOCK, _SUMS = 8192, 2048, 4096
_KEPT_TABLES = 64

_tables: dict[tuple[int | torch.device, ...], Tensor] = {}  # the last used comes last
_captured: dict[tuple[int | torch.device, ...], Tensor] = {}  # graphs read these for as long as they live


@triton.jit
def _pointer(table_ptr, row, num_tensors, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's address out of a row of the table."""
    pointer = tl.load(table_ptr + row * num_tensors + tensor).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _chunk_of(table_ptr, counts_row, num_tensors, CHUNK: tl.constexpr):
    """The tensor of this program, and the first and last value, exclusive, of its chunk.

    Below the row of counts are the n + 1 cumulative numbers of chunks.
    """
    chunks_ptr = table_ptr + (counts_row + 1) * num_tensors
    tensor = image_of(chunks_ptr, tl.program_id(0), num_tensors)
    first = (tl.program_id(0) - tl.load(chunks_ptr + tensor)) * CHUNK
    return tensor, first, tl.minimum(first + CHUNK, tl.load(table_ptr + counts_row * num_tensors + tensor))


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, ema_ptr, copy_ptr, start, end, scale, decay, beta1, follow1, beta2, follow2,
    step_size, inverse_bias2_sqrt, eps, follow_ema, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of values; MASKED where it may reach past the end, which costs the wide accesses."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < end if MASKED else None
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32) * scale
    m = beta1 * tl.load(m_ptr + offs, mask=mask) + follow1 * g
    v = beta2 * tl.load(v_ptr + offs, mask=mask) + follow2 * (g * g)
    p = tl.load(p_ptr + offs, mask=mask).to(tl.float32) * decay
    p -= step_size * (m / (tl.sqrt(v) * inverse_bias2_sqrt + eps))
    ema = tl.load(ema_ptr + offs, mask=mask)
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)
    tl.store(ema_ptr + offs, ema + follow_ema * (p - ema), mask=mask)
    rounded = p.to(p_ptr.dtype.element_ty)
    tl.store(p_ptr + offs, rounded, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, rounded.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step_kernel(
    table_ptr,  # rows: p, g, m, v, ema, copy (where there is one), counts, chunks
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
    eps: tl.float64,
    weight_decay: tl.float64,
    bias1: tl.float64,
    bias2_sqrt: tl.float64,
    ema_decay: tl.float64,
    DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In float64, as 1 - beta2 and the like lose digits; all of it is one value a program.
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.float64)
        bias1 = 1.0 - tl.exp(step * log_beta1)
        bias2_sqrt = tl.sqrt(1.0 - tl.exp(step * log_beta2))
    if ema_decay_ptr is not None:
        ema_decay = tl.load(ema_decay_ptr)
    scale = 1.0 if grad_scale_ptr is None else tl.load(grad_scale_ptr)
    decay = tl.full((), 1.0 - lr * weight_decay, tl.float32)
    # Not in float64, whose division takes so many registers that they spill.
    step_size = tl.full((), lr, tl.float32) / tl.full((), bias1, tl.float32)
    inverse_bias2_sqrt = 1.0 / tl.full((), bias2_sqrt, tl.float32)
    follow1, follow2 = tl.full((), 1.0 - beta1, tl.float32), tl.full((), 1.0 - beta2, tl.float32)
    follow_ema = tl.full((), 1.0 - ema_decay, tl.float32)
    beta1, beta2 = tl.full((), beta1, tl.float32), tl.full((), beta2, tl.float32)
    eps = tl.full((), eps, tl.float32)

    COUNTS: tl.constexpr = 5 if COPY_DTYPE is None else 6
    tensor, first, last = _chunk_of(table_ptr, COUNTS, num_tensors, CHUNK)
    if found_inf_ptr is not None:
        last = tl.where(tl.load(found_inf_ptr) != 0, first, last)
    p_ptr = _pointer(table_ptr, 0, num_tensors, tensor, DTYPE, ALIGNED)
    g_ptr = _pointer(table_ptr, 1, num_tensors, tensor, DTYPE, ALIGNED)
    m_ptr = _pointer(table_ptr, 2, num_tensors, tensor, tl.float32, ALIGNED)
    v_ptr = _pointer(table_ptr, 3, num_tensors, tensor, tl.float32, ALIGNED)
    ema_ptr = _pointer(table_ptr, 4, num_tensors, tensor, tl.float32, ALIGNED)
    copy_ptr = None if COPY_DTYPE is None else _pointer(table_ptr, 5, num_tensors, tensor, COPY_DTYPE, ALIGNED)
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
    tensor, first, last = _chunk_of(table_ptr, 1, num_tensors, CHUNK)
    x_ptr = _pointer(table_ptr, 0, num_tensors, tensor, DTYPE, ALIGNED)
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


def _table(op: str, rows: list[list[int]], chunk: int, like: Tensor) -> tuple[Tensor, int]:
    """A table of addresses and, last, of counts on the device of `like`, and the number of chunks of all tensors."""
    chunks = list(itertools.accumulate((triton.cdiv(count, chunk) for count in rows[-1]), initial=0))
    values = (*itertools.chain.from_iterable(rows), *chunks)
    key = (like.device, *values)
    table = _tables.pop(key, None)
    capturing = backend.is_capturing(like)
    if table is None:
        if capturing:
            raise RuntimeError(
                f"{op}: tensors lie elsewhere than in the step before the capture of this CUDA graph, and their "
                "addresses cannot be uploaded within it; run a step first, and keep gradients in place "
                "(zero_grad(set_to_none=False))"
            )
        # From pinned memory the copy does not wait for the device.
        host = torch.tensor(values, dtype=torch.int64, pin_memory=like.is_cuda)
        table = host.to(like.device, non_blocking=True)
        if len(_tables) == _KEPT_TABLES:
            del _tables[next(iter(_tables))]
    _tables[key] = table
    if capturing:
        _captured[key] = table
    return table, chunks[-1]


def _groups(lists: list[list[Tensor]], dtype_lists: tuple[int, ...]) -> dict[tuple, list[int]]:
    """Indices of tensors that one launch serves: of equal dtypes in some of the lists, and equally aligned."""
    groups: dict[tuple, list[int]] = {}
    for index, tensors in enumerate(zip(*lists, strict=True)):
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        groups.setdefault((aligned, *(tensors[i].dtype for i in dtype_lists)), []).append(index)
    return groups


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


@opaque("global_norm_triton(Tensor[] tensors) -> Tensor", fakes.global_norm)
def global_norm(tensors: list[Tensor]) -> Tensor:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return reference.global_norm(tensors)
    tensors = [tensor.contiguous() for tensor in tensors]
    launches = []
    for (aligned, dtype), members in _groups([tensors], (0,)).items():
        addresses, counts = [tensors[i].data_ptr() for i in members], [tensors[i].numel() for i in members]
        table, num_chunks = _table("global_norm", [addresses, counts], _NORM_CHUNK, tensors[0])
        launches.append((table, num_chunks, len(members), dtype, aligned))
    num_sums = sum(num_chunks for _, num_chunks, *_ in launches)
    sums, norm = tensors[0].new_empty(num_sums, dtype=torch.float32), tensors[0].new_empty((), dtype=torch.float32)
    begin = 0
    with backend.current_device_of(norm):
        for table, num_chunks, num_tensors, dtype, aligned in launches:
            if num_chunks > 0:
                _squares_kernel[(num_chunks,)](
                    table, sums[begin:], num_tensors, DTYPE=_triton_dtype(dtype), ALIGNED=aligned, CHUNK=_NORM_CHUNK,
                    BLOCK=_NORM_BLOCK,
                )  # fmt: skip
            begin += num_chunks
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
    lists = [params, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, emas]
    if copies:
        lists.append(copies)
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    for (aligned, dtype, *copy_dtype), members in _groups(lists, (0, 5) if copies else (0,)).items():
        if dtype == torch.float64:
            parts = [[tensors[i] for i in members] for tensors in lists]
            reference.step_(
                *parts, *([] if copies else [[]]), grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay,
                lr_tensor, step_tensor, ema_decay_tensor, found_inf,
            )  # fmt: skip
            continue
        rows = [[tensors[i].data_ptr() for i in members] for tensors in lists]
        rows.append([params[i].numel() for i in members])
        table, num_chunks = _table("adamw_ema", rows, _CHUNK, params[0])
        if num_chunks == 0:
            continue
        with backend.current_device_of(params[0]):
            _step_kernel[(num_chunks,)](
                table, grad_scale, lr_tensor, step_tensor, ema_decay_tensor, found_inf, len(members), lr, beta1, beta2,
                log_beta1, log_beta2, eps, weight_decay, 1.0 - beta1**step,
                math.sqrt(1.0 - beta2**step), ema_decay,
                DTYPE=_triton_dtype(dtype), COPY_DTYPE=_triton_dtype(copy_dtype[0]) if copies else None,
                ALIGNED=aligned, CHUNK=_CHUNK, BLOCK=_BLOCK,
            )  # fmt: skip
