"""NVIDIA apex, where it is installed: its FusedAdam with our EMA beside it, and its FusedLayerNorm.

The package that PyPI calls apex is another project; `maskdm_fast.ops.nvidia_apex` tells them apart.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from maskdm_fast.ops import nvidia_apex
from maskdm_fast.ops.adamw_ema.op import global_norm
from maskdm_fast.optim.adamw_ema import AdamWEMA
from maskdm_fast.optim.ema_optimizer import cut_by_value_, ema_decay_at

_DEVICE = "cuda"  # the only one that apex has kernels for


def _check(part: str, tensors: Iterable[Tensor]) -> None:
    reason = nvidia_apex.why_not(part)
    if reason is not None:
        raise RuntimeError(reason)
    for tensor in tensors:
        if tensor.device.type != _DEVICE:
            raise ValueError(f"apex.{part} has kernels for CUDA only, but a parameter is on {tensor.device}")


class ApexAdamEMA(AdamWEMA):
    """`AdamWEMA` by apex's FusedAdam: the same formula, arguments, state and checkpoints, the same values but rounding.

    Clipping and EMA are passes of their own, so one step reads and writes memory more often than `AdamWEMA`: for
    comparison, and for those who trust apex. Gradients are clipped in place. Of 16-bit parameters the EMA averages the
    rounded values. It knows no loss scale, and keeps ``exp_avg`` for every beta1.

    Args:
        params, ...: as for `AdamWEMA`; on a CUDA device; float32, float16 or bfloat16.

    Raises:
        RuntimeError: NVIDIA's apex is not installed, or was built without its kernels.
        ValueError: a value outside its range; a parameter is not on a CUDA device.

    Source: https://nvidia.github.io/apex/optimizers.html, with ``adam_w_mode=True``.
    """

    _keeps_first_moment = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = 0.9999,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, ema_decay, max_grad_norm, max_grad_value=max_grad_value)
        _check("optimizers", self._owned())
        self._adam = self._make_adam()

    def _owned(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _make_adam(self) -> torch.optim.Optimizer:
        from apex.optimizers import FusedAdam

        return FusedAdam(self._owned(), adam_w_mode=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles; torch calls it as it loads a state dict, too."""
        super().__setstate__(state)
        if "_adam" not in vars(self):
            self._adam = self._make_adam()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; parameters without one keep their value and EMA."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # FusedAdam counts one step for all of a group: parameters of one age make a group of their own.
        groups = []
        for group in self.param_groups:
            with_grad = [param for param in group["params"] if param.grad is not None]
            self._check_dense([param.grad for param in with_grad])
            by_step: dict[int, list[Tensor]] = {}
            for param, state in zip(with_grad, self._states_of(with_grad), strict=True):
                param.grad = param.grad.contiguous()
                by_step.setdefault(state["step"], []).append(param)
            groups += [
                {**group, "bias_correction": True, "params": params, "step": step} for step, params in by_step.items()
            ]
        grads = [param.grad for group in groups for param in group["params"]]
        if self.max_grad_value is not None:
            cut_by_value_(grads, self.max_grad_value)
        self.grad_norm = global_norm(grads)
        if self.max_grad_norm is not None and grads:
            torch._foreach_mul_(grads, (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0))
        self._adam.state, self._adam.param_groups = self.state, groups
        self._adam.step()
        for group in groups:
            torch.autograd.graph.increment_version(group["params"])  # which apex's kernels do not
            states = [self.state[param] for param in group["params"]]
            for state in states:
                state["step"] += 1
            if group["ema_decay"] is None:
                continue
            emas = [state["ema"] for state in states]
            values = [param.to(ema.dtype) for param, ema in zip(group["params"], emas, strict=True)]
            torch._foreach_lerp_(emas, values, 1.0 - ema_decay_at(states[0]["step"], group["ema_decay"]))
        return loss


def use_apex_layer_norm(model: nn.Module) -> None:
    """Replace every affine `nn.LayerNorm` within `model` by apex's FusedLayerNorm, which takes over its parameters.

    Names and values in the state dict stay as they are. Under autocast the result has the autocast dtype, as with the
    layer norms of `maskdm_fast.models`.

    Raises:
        RuntimeError: NVIDIA's apex is not installed, or was built without its kernels.
        ValueError: a parameter is not on a CUDA device.

    Source: https://nvidia.github.io/apex/layernorm.html.
    """
    _check("normalization", model.parameters())
    from apex.normalization import FusedLayerNorm

    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
                fused = FusedLayerNorm(norm.normalized_shape, eps=norm.eps)
                fused.weight, fused.bias = norm.weight, norm.bias
                setattr(module, name, fused.train(norm.training))
