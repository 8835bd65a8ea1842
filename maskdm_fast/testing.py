"""How the ops are proven: the tolerance rule, awkward memory layouts, and the runner that tests and benchmarks share.

Every ``maskdm_fast.ops.<op>.cases`` module has

    CASES                    the shapes that every backend and dtype is tested on
    random_case(rng)         a case with sizes drawn from a `random.Random`
    make_inputs(case, dtype, device, seed)    keyword arguments of the op, drawn statelessly
    call(inputs, backend)    runs the op and returns its outputs by name
    WITH_GRAD                names of the inputs that receive gradients
    EXACT                    whether the op only copies, so that results are bit-equal
    FIXED_DTYPE              names of the inputs whose dtype does not follow the tested one
"""

import contextlib
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast import random

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch.empty hands out with NaN (or the largest integer), so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    """Standard normal values, the same on every device."""
    count = torch.Size(shape).numel()
    slots = torch.zeros(1, dtype=torch.int64)
    values = random.normal(count, seed=seed, stream=random.Stream.NOISE, step=0, slots=slots, dtype=torch.float64)
    return values[0].view(shape).to(device, dtype)


def draw_ids(num_images: int, num_visible: int, num_tokens: int, device: torch.device | str, seed: int) -> Tensor:
    """Distinct ascending token indices of each image, int64 ``[B, K]``."""
    slots = torch.arange(num_images)
    keys = random.bits(num_tokens, seed=seed, stream=random.Stream.MASK, step=0, slots=slots)
    return keys.argsort(dim=1, stable=True)[:, :num_visible].sort(dim=1).values.to(device)


def draw_packed_ids(counts: list[int], num_tokens: int, device: torch.device | str, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct ascending token indices, ``counts[b]`` of image b: int64 ``[T]``, and their int32 ``cu_seqlens``."""
    kept = [draw_ids(len(counts), count, num_tokens, device, seed)[image] for image, count in enumerate(counts)]
    ids_keep = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64, device=device)
    ends = list(itertools.accumulate(counts, initial=0))
    return ids_keep, torch.tensor(ends, dtype=torch.int32, device=device)


def _garbage(dtype: torch.dtype) -> float | int | bool:
    """What shows where it is read."""
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max


def restride(tensor: Tensor, layout: str) -> Tensor:
    """The same shape in another memory layout; the same values too, except that "expanded" repeats the first image.

    What "transposed" and "sliced" make of more than one axis is contiguous in a single one: there every second value of
    a longer tensor is taken.
    """
    if tensor.dim() == 1 and layout in ("transposed", "sliced"):
        wide = torch.full((2 * len(tensor),), _garbage(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
        view = wide[1::2]
        view.copy_(tensor)
        return view
    if layout == "transposed":
        order = list(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "sliced":
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        wide = torch.full(shape, _garbage(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
        view = wide[..., 1 : 1 + tensor.shape[-1]]
        view.copy_(tensor)
        return view
    if layout == "expanded" and tensor.shape[0] > 0:
        return tensor[:1].clone().expand_as(tensor)
    return tensor.contiguous()


def restride_one(inputs: dict[str, Any], layout: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments of an op with one of them in another layout, for each that is a tensor or a tuple of them; its name.

    Where all have one layout, as in most cases, a backend that takes an argument for contiguous may look at none: the
    layout of another sends the call elsewhere. What is written in place comes in lists, and has to be contiguous.
    """

    def fits(value: Any) -> bool:
        # Repeated ids and cu_seqlens are wrong values.
        return isinstance(value, Tensor) and value.dim() > 0 and (layout != "expanded" or value.is_floating_point())

    for name, value in inputs.items():
        if fits(value):
            yield name, inputs | {name: restride(value, layout)}
        elif isinstance(value, tuple) and all(map(fits, value)):
            yield name, inputs | {name: tuple(restride(item, layout) for item in value)}


def map_floating(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating-point tensor and dtype in it replaced; lists and tuples are entered."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, list | tuple):
        return type(value)(map_floating(item, dtype) for item in value)
    return value


def on_fake_cuda(value: Any) -> Any:
    """`value` with every tensor in it on a CUDA device that need not be there; call it within a `FakeTensorMode`."""

    def convert(tensor: Tensor) -> Tensor:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        return torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake

    return _pytree.tree_map_only(Tensor, convert, value)


class NoTransfer(TorchDispatchMode):
    """Refuses operators whose tensors are on several devices: a copy between them, which may wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in _pytree.tree_leaves((args, kwargs, out)) if isinstance(value, Tensor)]
        assert len({tensor.device for tensor in tensors}) < 2, f"{func} copies from device to device"
        return out


def run(cases: ModuleType, inputs: dict[str, Any], backend: str, grad_layout: str = "contiguous") -> dict[str, Tensor]:
    """Run an op forward, and backward from random upstream gradients; outputs and gradients by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in cases.WITH_GRAD if inputs.get(name) is not None}
    # In-place ops get copies, so that one set of inputs serves several runs.
    fresh = {
        name: [item.clone() for item in value] if isinstance(value, list) else value for name, value in inputs.items()
    }
    outputs = cases.call(fresh | leaves, backend)
    results = {name: output.detach() for name, output in outputs.items()}
    if leaves:
        upstream = []
        for index, output in enumerate(outputs.values()):
            grad = draw(tuple(output.shape), output.dtype, output.device, seed=1000 + index)
            upstream.append(restride(grad, grad_layout) if grad.dim() > 0 else grad)
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
        results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def assert_close(name: str, out: Tensor, ref64: Tensor, low: Tensor) -> None:
    """The tolerance rule: ``|out - ref64| <= 3 (max |low - ref64| + eps(dtype) max(1, max |ref64|))``.

    Args:
        out: what is tested.
        ref64: the float64 reference on the same rounded inputs.
        low: the reference in the tested dtype. In float64 that would be ref64 itself; there it is the float32
            reference, and its error counts scaled by eps(float64) / eps(float32).
    """
    assert out.shape == ref64.shape, f"{name}: shape {list(out.shape)}, want {list(ref64.shape)}"
    if out.numel() == 0:
        return
    assert torch.isfinite(out).all(), f"{name}: not finite"
    eps = torch.finfo(out.dtype).eps
    low_error = (low.double() - ref64).abs().max() * (eps / torch.finfo(low.dtype).eps)
    bound = 3.0 * (low_error + eps * max(1.0, float(ref64.abs().max())))
    error = (out.double() - ref64).abs().max()
    assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"


def check_parity(
    cases: ModuleType, inputs: dict[str, Any], backend: str, grad_layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Compare `backend` with the reference, outputs and gradients; return what `backend` gave."""

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        free = {name: map_floating(value, dtype) for name, value in inputs.items() if name not in cases.FIXED_DTYPE}
        return run(cases, inputs | free, "reference", grad_layout)

    out = run(cases, inputs, backend, grad_layout)
    same = run(cases, inputs, "reference", grad_layout)
    for name, value in out.items():
        assert value.dtype == same[name].dtype, f"{name}: dtype {value.dtype}, want {same[name].dtype}"
        if cases.EXACT:
            assert torch.equal(value, same[name]), f"{name}: not bit-equal"
    if not cases.EXACT:
        ref64 = reference(torch.float64)
        in_float64 = any(value.dtype == torch.float64 for value in out.values())
        low = reference(torch.float32) if in_float64 else same
        for name, value in out.items():
            assert_close(name, value, ref64[name].double(), low[name])
    return out
