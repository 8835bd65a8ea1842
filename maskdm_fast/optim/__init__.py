"""Optimizers over the fused steps of `maskdm_fast.ops`."""

from maskdm_fast.optim.adamw_ema import AdamWEMA
from maskdm_fast.optim.ema_optimizer import ema_decay_at
from maskdm_fast.optim.lamb_ema import LambEMA
from maskdm_fast.optim.nvidia_apex import ApexAdamEMA, use_apex_layer_norm

__all__ = ["AdamWEMA", "ApexAdamEMA", "LambEMA", "ema_decay_at", "use_apex_layer_norm"]
