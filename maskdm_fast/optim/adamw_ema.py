"""AdamW whose state holds the EMA of the weights: whatever shards, offloads or saves the state takes the EMA along."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.adamw_ema.op import adamw_ema, global_norm
from maskdm_fast.ops.checks import accumulate_dtype


def ema_decay_at(step: int, ema_decay: float) -> float:
    """EMA decay of step k, counted from 1: ``min(ema_decay, 1 - (1 + k) ** (-2/3))``.

    The warm-up forgets the initial weights: early averages span a share of the run so far instead of
    ``1 / (1 - ema_decay)`` steps. Source: the inverse-power rule of ema_pytorch, which the official MaskDM code uses.
    """
    return min(ema_decay, 1.0 - (1.0 + step) ** (-2.0 / 3.0))


class AdamWEMA(torch.optim.Optimizer):
    """Global-norm clipping, AdamW and an exponential moving average of the weights, one pass over memory per step.

    The state of a parameter is ``step`` (int), ``exp_avg``, ``exp_avg_sq`` and ``ema``, the last three in float32
    (float64 for float64 parameters). The EMA starts at the initial weights and decays by `ema_decay_at`.

    Args:
        params: contiguous parameters, or groups of them; every group may override the values below but `max_grad_norm`.
        lr: learning rate, >= 0.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled, >= 0.
        ema_decay: in [0, 1].
        max_grad_norm: scale all gradients so that their global L2 norm is at most this; None: no clipping.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
        max_grad_norm: float | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"AdamWEMA: lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamWEMA: betas are {betas}, want each in [0, 1)")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"AdamWEMA: ema_decay is {ema_decay}, want it in [0, 1]")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"AdamWEMA: max_grad_norm is {max_grad_norm}, want a positive number or None")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None  # global norm before clipping, of the last step

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            dtype = accumulate_dtype(param.dtype)
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            state["ema"] = param.detach().to(dtype, copy=True)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; parameters without one keep their value and EMA."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = []
        for group in self.param_groups:
            pairs = [(param, param.grad) for param in group["params"]]
            groups.append([(param, grad) for param, grad in pairs if grad is not None])
        self.grad_norm = global_norm([grad for pairs in groups for _, grad in pairs])
        grad_scale = None
        if self.max_grad_norm is not None:
            grad_scale = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).to(torch.float32)
        for group, pairs in zip(self.param_groups, groups, strict=True):
            # One call for all parameters of one age: after an unfreeze, ages within a group differ.
            by_step: dict[int, list[tuple[Tensor, ...]]] = {}
            for param, grad in pairs:
                state = self._state_of(param)
                state["step"] = step = state["step"] + 1
                row = (param, grad, state["exp_avg"], state["exp_avg_sq"], state["ema"])
                by_step.setdefault(step, []).append(row)
            for step, rows in by_step.items():
                adamw_ema(
                    *zip(*rows, strict=True),
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    ema_decay=ema_decay_at(step, group["ema_decay"]),
                    grad_scale=grad_scale,
                )
        return loss

    def ema_parameters(self) -> Iterator[Tensor]:
        """The EMA of every parameter, in the order of the parameters; before the first step, the weights themselves."""
        for group in self.param_groups:
            for param in group["params"]:
                yield self._state_of(param)["ema"]
