"""adamw_ema: clip scale, decoupled AdamW, EMA and a low-precision copy in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.adam import check_list, take_step
from maskdm_fast.ops.adamw_ema import native_impl, reference
from maskdm_fast.ops.checks import check_strided, check_tensor

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.adamw_ema import triton_impl

    IMPL["triton"] = triton_impl


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int | Tensor,
    ema_decay: float | Tensor | None = None,
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

    With ``beta1 = 0`` m is g itself: without `exp_avgs` nothing of it is kept, and the step is the same bit for bit.
    What is not there is neither read nor written.

    Args:
        params: float32, float16, bfloat16 or float64 tensors, contiguous. 16-bit parameters are updated in float32 and
            rounded; their `emas` average the unrounded values.
        grads: gradients of the same shapes and dtypes.
        exp_avgs, exp_avg_sqs, emas: m, v and EMA of the same shapes, contiguous; float64 for float64, else float32.
            `exp_avgs` may be None if beta1 is 0, `emas` at any time: then there is no average.
        lr: learning rate, >= 0; or a float32 scalar tensor.
        betas: decay rates of m and v, in [0, 1).
        eps: added to the root of v_hat, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        step: index of this step, from 1; or an int64 scalar tensor.
        ema_decay: in [0, 1]; or a float64 scalar tensor (in float32, 1 - ema_decay keeps three digits of 0.9999). Not
            used without `emas`.
        grad_scale: float32 scalar tensor, e.g. the clipping factor; None: 1.
        found_inf: float32 scalar tensor; where it is not 0 the step changes nothing, whatever the gradients hold, as
            for a step of mixed precision whose gradients overflowed; None: 0.
        copies: float16 or bfloat16 tensors that receive the new parameters; empty: none.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Scalar tensors are on the device of `params` and are read there, without a wait; their values are not checked. A
    CUDA graph replays with what they hold then, while a number stays what it was when the graph was captured.

    Raises:
        ValueError, TypeError: wrong shape, length, layout, value or device; wrong type or dtype; no `exp_avgs`, but a
            beta1.
        RuntimeError: the named backend cannot run.

    Source: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.
    """
    take_step(
        "adamw_ema", IMPL, (params, grads, exp_avgs, exp_avg_sqs, emas, copies), lr=lr, betas=betas, eps=eps,
        weight_decay=weight_decay, step=step, ema_decay=ema_decay, grad_scale=grad_scale, found_inf=found_inf,
        backend=backend, optional=("exp_avgs", "emas"),
    )  # fmt: skip


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """L2 norm of all values of `tensors`: ``sqrt(sum_i sum x_i^2)``, the global norm that clips gradients.

    Args:
        tensors: float32, float16, bfloat16 or float64, of any shapes and strides, on one device.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        A scalar, float64 if one of `tensors` is, else float32; 0 for an empty list. Summed in float64 by ``"cpu"``.

    Raises:
        ValueError, TypeError: one of them is sparse; not a list, or not of tensors.
        RuntimeError: the named backend cannot run.
    """
    check_list("global_norm", "tensors", tensors)
    if len(tensors) == 0:
        return torch.zeros(())
    check_tensor("global_norm", "tensors[0]", tensors[0])
    chosen = backends.choose("global_norm", IMPL, tensors[0], backend)
    try:
        return IMPL[chosen].global_norm(list(tensors))
    except (RuntimeError, AttributeError, TypeError):
        for index, tensor in enumerate(tensors):
            check_tensor("global_norm", f"tensors[{index}]", tensor)
            check_strided("global_norm", f"tensors[{index}]", tensor)
        raise
