"""adamw_ema: clip scale, decoupled AdamW, EMA and a low-precision copy in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.adamw_ema import native_impl, reference
from maskdm_fast.ops.checks import FLOATING, accumulate_dtype, check_device, check_dtype, check_shape

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.adamw_ema import triton_impl

    IMPL["triton"] = triton_impl

_OP = "adamw_ema"


def _check_scalar(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    check_dtype(_OP, name, tensor, (dtype,))
    check_shape(_OP, name, tensor)
    check_device(_OP, name, tensor, device)
    return tensor


def _check_list(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{_OP}: {name} has {len(tensors)} tensors, want {len(params)}")
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
            tensor.dtype in wanted
            and tensor.shape == param.shape
            and tensor.device == device
            and (not written or tensor.is_contiguous())
        ):
            continue
        label = f"{name}[{index}]"
        check_dtype(_OP, label, tensor, wanted)
        check_device(_OP, label, tensor, device)
        check_shape(_OP, label, tensor, *param.shape)
        raise ValueError(f"{_OP}: {label} is not contiguous, and it is written in place")


def _check_lists(lists: tuple[Sequence[Tensor], ...]) -> None:
    params, grads, exp_avgs, exp_avg_sqs, emas, copies = lists
    device = params[0].device
    for index, param in enumerate(params):
        if param.dtype not in FLOATING or param.device != device:
            check_dtype(_OP, f"params[{index}]", param, FLOATING)
            check_device(_OP, f"params[{index}]", param, device)
        if not param.is_contiguous():
            raise ValueError(f"{_OP}: params[{index}] is not contiguous, and it is written in place")
    _check_list("grads", grads, params)
    _check_list("exp_avgs", exp_avgs, params)
    _check_list("exp_avg_sqs", exp_avg_sqs, params)
    _check_list("emas", emas, params)
    if copies:
        _check_list("copies", copies, params)


def _native_checks(chosen: str, lists: tuple[Sequence[Tensor], ...]) -> bool:
    """Whether the native step will look at the lists itself: eagerly, and with everything on devices of its kind."""
    if chosen not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return False
    if chosen == "cuda":
        return all(tensor.is_cuda for tensors in lists for tensor in tensors)
    return all(tensor.is_cpu for tensors in lists for tensor in tensors)


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int | Tensor,
    ema_decay: float | Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    backend: str | None = None,
) -> None:
    """One optimizer step, in place, for every parameter p with gradient g:

        g    = grad_scale g
        m    = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
        p    = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps),    m_hat = m / (1 - beta1^step), v_hat alike
        ema  = ema + (1 - ema_decay) (p - ema)
        copy = p rounded

    Args:
        params: float32, float16, bfloat16 or float64 tensors, contiguous. 16-bit parameters are updated in float32 and
            rounded; their `emas` average the unrounded values.
        grads: gradients of the same shapes and dtypes.
        exp_avgs, exp_avg_sqs, emas: m, v and EMA of the same shapes, contiguous; float64 for float64, else float32.
        lr: learning rate, >= 0; or a float32 scalar tensor.
        betas: decay rates of m and v, in [0, 1).
        eps: added to the root of v_hat, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        step: index of this step, from 1; or an int64 scalar tensor.
        ema_decay: in [0, 1]; or a float64 scalar tensor (in float32, 1 - ema_decay keeps three digits of 0.9999).
        grad_scale: float32 scalar tensor, e.g. the clipping factor; None: 1.
        found_inf: float32 scalar tensor; where it is not 0 the step changes nothing, whatever the gradients hold, as
            for a step of mixed precision whose gradients overflowed; None: 0.
        copies: float16 or bfloat16 tensors that receive the new parameters; empty: none.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Scalar tensors are on the device of `params` and are read there, without a wait; their values are not checked. A
    CUDA graph replays with what they hold then, while a number stays what it was when the graph was captured.

    Raises:
        ValueError, TypeError: wrong shape, length, layout, value or device; wrong dtype.
        RuntimeError: the named backend cannot run.

    Source: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.
    """
    if not params:
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs, emas, copies)
    chosen = backends.choose(_OP, IMPL, params[0], backend)
    device = params[0].device
    if grad_scale is not None:
        _check_scalar("grad_scale", grad_scale, torch.float32, device)
    if found_inf is not None:
        _check_scalar("found_inf", found_inf, torch.float32, device)
    lr_tensor = step_tensor = ema_decay_tensor = None
    if isinstance(lr, Tensor):
        lr, lr_tensor = 0.0, _check_scalar("lr", lr, torch.float32, device)
    if isinstance(step, Tensor):
        step, step_tensor = 1, _check_scalar("step", step, torch.int64, device)
    if isinstance(ema_decay, Tensor):
        ema_decay, ema_decay_tensor = 0.0, _check_scalar("ema_decay", ema_decay, torch.float64, device)
    beta1, beta2 = betas
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
            raise ValueError(f"{_OP}: {name} is {value}, outside its range")
    native = _native_checks(chosen, lists)
    if not native:
        _check_lists(lists)
    try:
        IMPL[chosen].step_(
            *map(list, lists), grad_scale, lr, beta1, beta2, eps, weight_decay, step, ema_decay,
            lr_tensor, step_tensor, ema_decay_tensor, found_inf,
        )  # fmt: skip
    except RuntimeError:
        if native:
            _check_lists(lists)  # raises what the native check found, in the words of the other ops
        raise


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """L2 norm of all values of `tensors`: ``sqrt(sum_i sum x_i^2)``, the global norm that clips gradients.

    Args:
        tensors: float32, float16, bfloat16 or float64, of any shapes and strides, on one device.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        A scalar, float64 if one of `tensors` is, else float32; 0 for an empty list. Summed in float64 by ``"cpu"``.

    Raises:
        RuntimeError: the named backend cannot run.
    """
    if not tensors:
        return torch.zeros(())
    return IMPL[backends.choose("global_norm", IMPL, tensors[0], backend)].global_norm(list(tensors))
