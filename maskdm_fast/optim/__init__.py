"""Optimizers over the fused step of `maskdm_fast.ops.adamw_ema`."""

from maskdm_fast.optim.adamw_ema import AdamWEMA

__all__ = ["AdamWEMA"]
