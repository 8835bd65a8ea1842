"""LAMB with the EMA of the weights."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from maskdm_fast.ops.lamb_ema.op import lamb_ema
from maskdm_fast.optim.ema_optimizer import EMAOptimizer


class LambEMA(EMAOptimizer):
    """LAMB for large batches: AdamW's update of each tensor, scaled to the tensor's own norm; clipping and EMA as in
    `AdamWEMA`, in two passes over memory per step.

    The formula is that of `maskdm_fast.ops.lamb_ema`. The norms are those of whole tensors: not for parameters that are
    sharded or flattened. State, checkpoints and `capturable` are those of `AdamWEMA`, except that all slots are kept
    whatever the settings; a run may go on with the other.

    Args:
        params: contiguous parameters, or groups of them; every group may override the values below but the last four.
        lr: learning rate, >= 0; or a float32 scalar tensor. Relative to the norm of a tensor, so larger than AdamW's.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: part of the update that is scaled, >= 0.
        ema_decay: in [0, 1].
        min_ndim: tensors of fewer dimensions take AdamW's update as it is; 2: biases and the gains of norms.
        max_grad_norm: scale all gradients so that their global L2 norm is at most this; None: no clipping.
        capturable: keep what changes from step to step on the device.
        compute_grad_norm: whether a step takes the global norm of the gradients.
        max_grad_value: as of `AdamWEMA`.

    Attributes:
        grad_norm, found_inf: as of `AdamWEMA`.

    Raises:
        ValueError: a value outside its range, None for an ema_decay; clipping without the norm.

    Source: You et al. (arXiv 1904.00962), algorithm 2; what is not adapted, as in the authors' training of BERT.
    """

    _keeps_first_moment = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
        min_ndim: int = 2,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        compute_grad_norm: bool = True,
        max_grad_value: float | None = None,
    ) -> None:
        if ema_decay is None:
            raise ValueError("LambEMA: ema_decay is None, but its kernels always keep the average; want it in [0, 1]")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        defaults |= {"min_ndim": min_ndim}
        super().__init__(params, defaults, max_grad_norm, max_grad_value, capturable, compute_grad_norm)

    def _fused_step(self, group: dict[str, Any], *lists: tuple[Tensor, ...] | None, **numbers: Any) -> None:
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "min_ndim")}
        lamb_ema(*lists, **settings, **numbers)
