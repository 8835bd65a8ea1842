"""What the steps of Adam's family share, `adamw_ema` and `lamb_ema`: checks of their arguments, and the call."""

from collections.abc import Mapping, Sequence, Sized
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.checks import (
    FLOATING,
    accumulate_dtype,
    check_device,
    check_dtype,
    check_int,
    check_number,
    check_shape,
    check_strided,
)

Lists = tuple[Sequence[Tensor], ...]
_NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "copies")


def _check_scalar(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    check_dtype(op, name, tensor, (dtype,))
    check_shape(op, name, tensor)
    check_device(op, name, tensor, device)
    return tensor


def check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise TypeError if `tensors` is one tensor, an iterator, which can be read only once, or nothing of the kind."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sized):
        raise TypeError(f"{op}: {name} is of type {type(tensors).__name__}, want a list of tensors")


def _check_list(op: str, name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{op}: {name} has {len(tensors)} tensors, want {len(params)}")
    device, written = params[0].device, name != "grads"
    for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if name == "grads":
            wanted = (param.dtype,)
        elif name == "copies":
            wanted = (torch.float16, torch.bfloat16)
        else:
            wanted = (accumulate_dtype(param.dtype),)
        # Models have hundreds of tensors, and the checks that find the words for a wrong one take six times as long.
        if (
            isinstance(tensor, Tensor)
            and tensor.dtype in wanted
            and tensor.shape == param.shape
            and tensor.device == device
            and (tensor.is_contiguous() if written else tensor.layout is torch.strided)
        ):
            continue
        label = f"{name}[{index}]"
        check_dtype(op, label, tensor, wanted)
        check_strided(op, label, tensor)
        check_device(op, label, tensor, device)
        check_shape(op, label, tensor, *param.shape)
        raise ValueError(f"{op}: {label} is not contiguous, and it is written in place")


def _check_lists(op: str, lists: Lists) -> None:
    params, device = lists[0], lists[0][0].device
    for index, param in enumerate(params):
        if not isinstance(param, Tensor) or param.dtype not in FLOATING or param.device != device:
            check_dtype(op, f"params[{index}]", param, FLOATING)
            check_device(op, f"params[{index}]", param, device)
        if not param.is_contiguous():
            raise ValueError(f"{op}: params[{index}] is not contiguous, and it is written in place")
    for name, tensors in zip(_NAMES[1:], lists[1:], strict=True):
        if tensors or name in ("grads", "exp_avg_sqs"):  # what is empty else is not there, see `_present`
            _check_list(op, name, tensors, params)


def _present(op: str, lists: Sequence[Sequence[Tensor] | None], optional: Sequence[str]) -> Lists:
    """The lists, empty where one of the `optional` is None."""
    for name, tensors in zip(_NAMES, lists, strict=True):
        if tensors is None and name in optional:
            continue
        if tensors is None:
            raise TypeError(f"{op}: {name} is None, want a list of tensors")
        check_list(op, name, tensors)
        if len(tensors) == 0 and name in ("exp_avgs", "emas"):
            raise ValueError(f"{op}: {name} has 0 tensors, want {len(lists[0])}")
    return tuple([] if tensors is None else tensors for tensors in lists)


def _native_checks(chosen: str, lists: Lists) -> bool:
    """Whether the native step will look at the lists itself: eagerly, and with everything on devices of its kind."""
    if chosen not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return False
    try:
        if chosen == "cuda":
            return all(tensor.is_cuda for tensors in lists for tensor in tensors)
        return all(tensor.is_cpu for tensors in lists for tensor in tensors)
    except AttributeError:  # of what is no tensor, for which `_check_lists` has the words
        return False


def take_step(
    op: str,
    implementations: Mapping[str, ModuleType],
    lists: Sequence[Sequence[Tensor] | None],
    *settings: Any,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    ema_decay: float | Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
    optional: Sequence[str] = (),
) -> None:
    """Check the arguments of an op and call ``step_`` of a backend.

    Args:
        op: its name.
        implementations: its backends.
        lists: params, grads, exp_avgs, exp_avg_sqs, emas, copies. Without params nothing is done. Backends get an
            empty list for None.
        settings: what only this op takes; passed on after `ema_decay`.
        optional: which of exp_avgs and emas may be None.
        lr, ...: as the ops say.

    Raises:
        ValueError, TypeError: wrong shape, length, layout, value or device; wrong type or dtype.
        RuntimeError: the named backend cannot run.
    """
    check_list(op, "params", lists[0])
    if len(lists[0]) == 0:
        return
    check_dtype(op, "params[0]", lists[0][0], FLOATING)
    lists = _present(op, lists, optional)
    if not lists[4]:
        ema_decay = 0.0
    elif ema_decay is None:
        raise ValueError(f"{op}: ema_decay is None, want a number for the emas")
    chosen = backends.choose(op, implementations, lists[0][0], backend)
    device = lists[0][0].device
    if grad_scale is not None:
        _check_scalar(op, "grad_scale", grad_scale, torch.float32, device)
    if found_inf is not None:
        _check_scalar(op, "found_inf", found_inf, torch.float32, device)
    lr_tensor = step_tensor = ema_decay_tensor = None
    if isinstance(lr, Tensor):
        lr, lr_tensor = 0.0, _check_scalar(op, "lr", lr, torch.float32, device)
    if isinstance(step, Tensor):
        step, step_tensor = 1, _check_scalar(op, "step", step, torch.int64, device)
    check_int(op, "step", step)
    if isinstance(ema_decay, Tensor):
        ema_decay, ema_decay_tensor = 0.0, _check_scalar(op, "ema_decay", ema_decay, torch.float64, device)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{op}: betas is {betas!r}, want (beta1, beta2)")
    lr, eps, ema_decay = (
        check_number(op, name, value) for name, value in (("lr", lr), ("eps", eps), ("ema_decay", ema_decay))
    )
    beta1, beta2 = (check_number(op, f"betas[{index}]", beta) for index, beta in enumerate(betas))
    weight_decay = check_number(op, "weight_decay", weight_decay)
    for name, value, good in (
        ("lr", lr, lr >= 0),
        ("betas[0]", beta1, 0 <= beta1 < 1),
        ("betas[1]", beta2, 0 <= beta2 < 1),
        ("eps", eps, eps >= 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
        ("step", step, step >= 1),
        ("ema_decay", ema_decay, 0 <= ema_decay <= 1),
    ):
        if not good:
            raise ValueError(f"{op}: {name} is {value}, outside its range")
    if not lists[2] and beta1 != 0:
        raise ValueError(f"{op}: betas[0] is {beta1}, want 0 where exp_avgs is None")
    native = _native_checks(chosen, lists)
    if not native:
        _check_lists(op, lists)
    try:
        implementations[chosen].step_(
            *map(list, lists), grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay, *settings,
            lr_tensor, step_tensor, ema_decay_tensor, found_inf,
        )  # fmt: skip
    except RuntimeError:
        if native:
            _check_lists(op, lists)  # raises what the native check found, in the words of the other ops
        raise
    if chosen != "reference" and not torch.compiler.is_compiling():
        # Autograd does not see what kernels write, and would take new weights for those that a graph was made with. The
        # moments are in no graph, and each tensor costs time.
        for tensors in (lists[0], *lists[4:]):
            torch.autograd.graph.increment_version(tensors)
