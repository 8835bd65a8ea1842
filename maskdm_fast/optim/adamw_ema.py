"""AdamW with the EMA of the weights."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from maskdm_fast.ops.adamw_ema.op import adamw_ema
from maskdm_fast.optim.ema_optimizer import EMAOptimizer


class AdamWEMA(EMAOptimizer):
    """Global-norm clipping, AdamW and an exponential moving average of the weights, one pass over memory per step.

    The state of a parameter is ``step`` (int), ``exp_avg``, ``exp_avg_sq`` and ``ema``, the last three in float32
    (float64 for float64 parameters). The EMA starts at the initial weights and decays by `ema_decay_at`.

    With ``betas[0] = 0`` there is no ``exp_avg``, which would be the gradient: the steps are the same bit for bit, and
    take 4 bytes a parameter less. Without `ema_decay` there is no ``ema``, which saves as many.

    With `capturable`, ``step`` and the groups' ``lr`` are scalar tensors on the device of the parameters, int64 and
    float32, and a step can be recorded in a CUDA graph: each replay counts on and takes the learning rate that ``lr``
    holds then. PyTorch's schedulers write into the tensor; by hand it is ``group["lr"].fill_(value)``. Run a step, or
    load a state, before the capture. Either kind of optimizer loads the state of the other.

    Args:
        params: contiguous parameters, or groups of them; every group may override the values below but the last four.
        lr: learning rate, >= 0; or a float32 scalar tensor.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled, >= 0.
        ema_decay: in [0, 1]; None: no average is kept.
        max_grad_norm: scale all gradients so that their global L2 norm is at most this; None: no clipping.
        max_grad_value: first of all, in place, gradients that are NaN become 0 and all are cut to this absolute value
            (`maskdm_fast.optim.ema_optimizer.cut_by_value_`); None: they are taken as they are. Not with a loss scale.
        capturable: keep what changes from step to step on the device.
        compute_grad_norm: whether a step takes the global norm of the gradients. False where this optimizer holds a
            part of them only and whoever shards them clips and unscales: then `max_grad_norm` must be None.

    Attributes:
        grad_norm: of the last step, 0-d on the device: the global norm of the gradients, without their loss scale and
            before clipping to `max_grad_norm`; None where it is not computed.
        found_inf: of the last step, 0-d float32 on the device: 1 if it was skipped, else 0; None without a loss scale.

    Raises:
        ValueError: a value outside its range; clipping without the norm.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = 0.9999,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        compute_grad_norm: bool = True,
        max_grad_value: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        super().__init__(params, defaults, max_grad_norm, max_grad_value, capturable, compute_grad_norm)

    def _fused_step(self, group: dict[str, Any], *lists: tuple[Tensor, ...] | None, **numbers: Any) -> None:
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        adamw_ema(*lists, **settings, **numbers)
