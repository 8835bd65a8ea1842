"""What the Triton kernels of adamw_ema and lamb_ema share: launches over lists of tensors, and the numbers of a step.

The addresses and sizes of tensors lie in a table on the device. A program takes a chunk of values of one tensor, which
it finds by binary search. Tables have at most 72 bytes a tensor; they are kept and only uploaded when an address
changes, which in a CUDA graph it must not after the warm-up.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.triton_impl import image_of

_KEPT_TABLES = 64

_tables: dict[tuple[int | torch.device, ...], Tensor] = {}  # the last used comes last
_captured: dict[tuple[int | torch.device, ...], Tensor] = {}  # graphs read these for as long as they live


@triton.jit
def pointer_of(table_ptr, row, num_tensors, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's address out of a row of the table."""
    pointer = tl.load(table_ptr + row * num_tensors + tensor).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def chunk_of(table_ptr, counts_row, num_tensors, found_inf_ptr, CHUNK: tl.constexpr):
    """The tensor of this program, and the first and last value, exclusive, of its chunk: none where found_inf is not 0.

    Below the row of counts are the n + 1 cumulative numbers of chunks.
    """
    chunks_ptr = table_ptr + (counts_row + 1) * num_tensors
    tensor = image_of(chunks_ptr, tl.program_id(0), num_tensors)
    first = (tl.program_id(0) - tl.load(chunks_ptr + tensor)) * CHUNK
    last = tl.minimum(first + CHUNK, tl.load(table_ptr + counts_row * num_tensors + tensor))
    if found_inf_ptr is not None:
        last = tl.where(tl.load(found_inf_ptr) != 0, first, last)
    return tensor, first, last


@triton.jit
def number_of(pointer, value):
    """In float64: from memory, or `value` where `pointer` is None."""
    return value if pointer is None else tl.load(pointer).to(tl.float64)


@triton.jit
def rates_of(grad_scale_ptr, beta1, beta2):
    """What the moments take, in float32: the scale of gradients, beta1, 1 - beta1, beta2, 1 - beta2."""
    scale = 1.0 if grad_scale_ptr is None else tl.load(grad_scale_ptr)
    follow1, follow2 = tl.full((), 1.0 - beta1, tl.float32), tl.full((), 1.0 - beta2, tl.float32)
    return scale, tl.full((), beta1, tl.float32), follow1, tl.full((), beta2, tl.float32), follow2


@triton.jit
def biases_of(step_ptr, log_beta1, log_beta2, bias1, bias2_sqrt):
    """``1 - beta1^step`` and ``1 / sqrt(1 - beta2^step)`` in float32, of the step in memory where there is one.

    In float64 until the division, which there takes so many registers that they spill.
    """
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.float64)
        bias1 = 1.0 - tl.exp(step * log_beta1)
        bias2_sqrt = tl.sqrt(1.0 - tl.exp(step * log_beta2))
    return tl.full((), bias1, tl.float32), 1.0 / tl.full((), bias2_sqrt, tl.float32)


def bias_arguments(beta1: float, beta2: float, step: int) -> tuple[float, float, float, float]:
    """What `biases_of` takes: log beta1, log beta2, ``1 - beta1^step`` and ``sqrt(1 - beta2^step)``."""
    logarithms = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    return *logarithms, 1.0 - beta1**step, math.sqrt(1.0 - beta2**step)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Group:
    """Tensors that one launch serves: of equal dtypes in some of the lists, and equally aligned.

    Attributes:
        members: their places in the lists.
        dtypes: of the lists that were asked for.
        aligned: whether all of them begin at a multiple of 16 bytes.
        table: see `chunk_of`; None where no kernel has their dtype, float64.
        num_chunks: of all tensors.
    """

    members: list[int]
    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    table: Tensor | None
    num_chunks: int


def groups_of(
    op: str, lists: Sequence[Sequence[Tensor]], dtype_lists: Sequence[int], chunk: int, *rows: Sequence[int]
) -> Iterator[Group]:
    """The launches that lists of equal length take.

    Args:
        op: name of the op, for errors.
        lists: contiguous tensors; those of the first give the counts.
        dtype_lists: which lists have dtypes that differ between launches.
        chunk: values of a program.
        rows: further rows of the table, one number a tensor, between the addresses and the counts.

    Raises:
        RuntimeError: a CUDA graph is captured, and tensors have moved.
    """
    found: dict[tuple, list[int]] = {}
    for index, tensors in enumerate(zip(*lists, strict=True)):
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        found.setdefault((aligned, *(tensors[i].dtype for i in dtype_lists)), []).append(index)
    for (aligned, *dtypes), members in found.items():
        table, num_chunks = None, 0
        if torch.float64 not in dtypes:
            values = [[tensors[i].data_ptr() for i in members] for tensors in lists]
            values += [[row[i] for i in members] for row in rows]
            values.append([lists[0][i].numel() for i in members])
            table, num_chunks = _table(op, values, chunk, lists[0][0])
        yield Group(members, tuple(dtypes), aligned, table, num_chunks)


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
