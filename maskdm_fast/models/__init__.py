"""Networks on visible tokens, and their named sizes."""

from maskdm_fast.models.sizes import CONFIGS
from maskdm_fast.models.uvit import UViT, UViTConfig

__all__ = ["CONFIGS", "UViT", "UViTConfig"]
