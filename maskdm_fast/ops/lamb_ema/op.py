"""lamb_ema: LAMB with clip scale, EMA and a low-precision copy in two passes over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.adam import take_step
from maskdm_fast.ops.checks import check_int
from maskdm_fast.ops.lamb_ema import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.lamb_ema import triton_impl

    IMPL["triton"] = triton_impl


@torch.no_grad()
def lamb_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    step: int | Tensor,
    ema_decay: float | Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    min_ndim: int = 0,
    copies: Sequence[Tensor] = (),
    backend: str | None = None,
) -> None:
    """One optimizer step, in place, for every parameter tensor p with gradient g:

        g     = grad_scale g
        m     = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
        r     = m_hat / (sqrt(v_hat) + eps) + weight_decay p,    m_hat = m / (1 - beta1^step), v_hat alike
        trust = |p| / |r|,    L2 norms of the whole tensor; 1 where either is 0
        p     = p - lr trust r
        ema   = ema + (1 - ema_decay) (p - ema)
        copy  = p rounded

    Tensors of fewer than `min_ndim` dimensions take ``trust = 1``: with 2 these are biases and the gains of norms,
    which the authors' own runs leave out as well. The paper's phi is the identity, without bounds. With 0 it is what
    apex's FusedLAMB does with ``use_nvlamb=True``; by itself apex leaves out groups without weight decay instead.

    Args:
        params: float32, float16, bfloat16 or float64 tensors, contiguous, each a whole one: of a part the norms would
            mean nothing. 16-bit parameters are updated in float32 and rounded; their `emas` average the unrounded
            values.
        grads: gradients of the same shapes and dtypes.
        exp_avgs, exp_avg_sqs, emas: m, v and EMA of the same shapes, contiguous; float64 for float64, else float32.
        lr: learning rate, >= 0; or a float32 scalar tensor.
        betas: decay rates of m and v, in [0, 1).
        eps: added to the root of v_hat, >= 0.
        weight_decay: part of r, and so adapted with it, >= 0.
        step: index of this step, from 1; or an int64 scalar tensor.
        ema_decay: in [0, 1]; or a float64 scalar tensor.
        grad_scale: float32 scalar tensor, e.g. the clipping factor; None: 1.
        found_inf: float32 scalar tensor; where it is not 0 the step changes nothing, whatever the gradients hold;
            None: 0.
        min_ndim: fewest dimensions of a tensor that is adapted.
        copies: float16 or bfloat16 tensors that receive the new parameters; empty: none.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Scalar tensors are on the device of `params` and are read there, as in `adamw_ema`.

    Raises:
        ValueError, TypeError: wrong shape, length, layout, value or device; wrong type or dtype.
        RuntimeError: the named backend cannot run.

    Source: You et al. (arXiv 1904.00962), algorithm 2.
    """
    check_int("lamb_ema", "min_ndim", min_ndim)
    take_step(
        "lamb_ema", IMPL, (params, grads, exp_avgs, exp_avg_sqs, emas, copies), min_ndim, lr=lr, betas=betas, eps=eps,
        weight_decay=weight_decay, step=step, ema_decay=ema_decay, grad_scale=grad_scale, found_inf=found_inf,
        backend=backend,
    )  # fmt: skip
