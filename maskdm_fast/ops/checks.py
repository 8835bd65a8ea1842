"""The argument checks that the ops share.

Wrong shape, value or device: ValueError; wrong type or dtype: TypeError. Both name the op and the argument.
"""

import itertools
import numbers
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.random import INTS

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBERS = (float, torch.SymFloat, *INTS, numbers.Real)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and optimizer states of tensors of `dtype` have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor; the other checks of tensors take that for granted."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}, want a tensor")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless `tensor` is one, of one of the dtypes."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in allowed:
        check_tensor(op, name, tensor)
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}, want {wanted}")


def check_shape(op: str, name: str, tensor: Tensor, *wanted: int | str) -> None:
    """Compare with sizes; a string such as ``"K"`` in `wanted` stands for any size."""
    shape = tensor.shape
    if shape == wanted:
        return
    fits = len(shape) == len(wanted)
    if fits:
        for size, have in zip(wanted, shape):  # noqa: B905, of one length; strict=True doubles the time of a check
            if not isinstance(size, str) and size != have:
                fits = False
    if not fits:
        text = ", ".join([str(size) for size in wanted])
        raise ValueError(f"{op}: {name} has shape {list(shape)}, want [{text}]")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, want {device}")


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` is sparse."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"{op}: {name} has layout {str(tensor.layout).removeprefix('torch.')}, want a dense tensor")


def check_number(op: str, name: str, value: float) -> float:
    """`value` as a float. Raise TypeError for a tensor, which would get no gradient and be waited for, and the like."""
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a tensor, which gets no gradient, want a number")
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}, want a number")
    return float(value)


def check_int(op: str, name: str, value: int) -> None:
    """Raise TypeError unless `value` is an int."""
    if not isinstance(value, INTS):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}, want an int")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """int32 ``[B + 1]``; that it starts at 0, never falls and ends at T is checked where the values are at hand."""
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    check_device(op, "cu_seqlens", cu_seqlens, device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, want [B + 1]")


def values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at values costs no device wait and breaks no graph: an eager CPU tensor."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_segments(op: str, cu_seqlens: Tensor, num_tokens: int) -> None:
    """The values of `cu_seqlens`, as csrc/common/checks.h checks them; for the reference backend."""
    if not values_at_hand(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise RuntimeError(f"{op}: cu_seqlens[0] is {values[0]}, want 0")
    for index, (low, high) in enumerate(itertools.pairwise(values), start=1):
        if high < low:
            raise RuntimeError(f"{op}: cu_seqlens falls from {low} to {high} at {index}")
    if values[-1] != num_tokens:
        raise RuntimeError(f"{op}: cu_seqlens ends at {values[-1]}, want the number of packed tokens, {num_tokens}")


def segment_lengths(op: str, cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Token counts of the images that have any, checked; waits for the device."""
    bounds = cu_seqlens.cpu()
    check_segments(op, bounds, num_tokens)
    return [length for length in bounds.diff().tolist() if length > 0]


def check_ids(op: str, ids_keep: Tensor, num_tokens: int, cu_seqlens: Tensor | None, *, distinct: bool) -> None:
    """The values of `ids_keep`, as csrc/common/checks.h checks them; for the reference backend."""
    if not values_at_hand(ids_keep):
        return
    if cu_seqlens is None:
        images = list(ids_keep)
    else:
        check_segments(op, cu_seqlens, ids_keep.shape[0])
        images = list(ids_keep.tensor_split(cu_seqlens[1:-1].long())) if cu_seqlens.shape[0] > 1 else []
    for image, ids in enumerate(images):
        wrong = ((ids < 0) | (ids >= num_tokens)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise RuntimeError(
                f"{op}: ids_keep of image {image} holds {int(ids[at])} at {at}, want 0 <= id < {num_tokens}"
            )
        if distinct:
            ordered = ids.sort().values
            twice = ordered[1:][ordered[1:] == ordered[:-1]]
            if len(twice):
                raise RuntimeError(f"{op}: ids_keep of image {image} holds {int(twice[0])} twice, want distinct ids")


def image_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """For each packed token the index of its image, int64 ``[T]``."""
    counts = cu_seqlens.diff().to(torch.int64)
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=num_tokens)
