"""Fused operators for training on visible tokens: plain functions on tensors.

Each runs on the best backend that the machine has; ``backend=...`` or `use_backend` names one.
"""

from maskdm_fast.ops.adamw_ema.op import IMPL as _ADAMW_EMA
from maskdm_fast.ops.adamw_ema.op import adamw_ema
from maskdm_fast.ops.backend import use_backend
from maskdm_fast.ops.flop_formulas import register_flop_formulas
from maskdm_fast.ops.gather_tokens.op import IMPL as _GATHER_TOKENS
from maskdm_fast.ops.gather_tokens.op import gather_tokens, scatter_tokens
from maskdm_fast.ops.gelu.op import IMPL as _GELU
from maskdm_fast.ops.gelu.op import gelu
from maskdm_fast.ops.lamb_ema.op import IMPL as _LAMB_EMA
from maskdm_fast.ops.lamb_ema.op import lamb_ema
from maskdm_fast.ops.linear.op import IMPL as _LINEAR
from maskdm_fast.ops.linear.op import linear
from maskdm_fast.ops.masked_attention.op import BACKENDS as _MASKED_ATTENTION
from maskdm_fast.ops.masked_attention.op import masked_attention
from maskdm_fast.ops.masked_dsm_loss.op import IMPL as _MASKED_DSM_LOSS
from maskdm_fast.ops.masked_dsm_loss.op import masked_dsm_loss
from maskdm_fast.ops.noise_visible_patches.op import IMPL as _NOISE_VISIBLE_PATCHES
from maskdm_fast.ops.noise_visible_patches.op import noise_visible_patches
from maskdm_fast.ops.sid_loss.op import IMPL as _SID_LOSS
from maskdm_fast.ops.sid_loss.op import sid_loss

# Every op and its backends, for `maskdm-fast info` and the tests.
IMPLEMENTATIONS = {
    "noise_visible_patches": _NOISE_VISIBLE_PATCHES,
    "gather_tokens": _GATHER_TOKENS,
    "gelu": _GELU,
    "linear": _LINEAR,
    "masked_attention": _MASKED_ATTENTION,
    "masked_dsm_loss": _MASKED_DSM_LOSS,
    "sid_loss": _SID_LOSS,
    "adamw_ema": _ADAMW_EMA,
    "lamb_ema": _LAMB_EMA,
}

__all__ = [
    "adamw_ema",
    "gather_tokens",
    "gelu",
    "lamb_ema",
    "linear",
    "masked_attention",
    "masked_dsm_loss",
    "noise_visible_patches",
    "register_flop_formulas",
    "scatter_tokens",
    "sid_loss",
    "use_backend",
]
