"""Networks on visible tokens, their named sizes, and weights from other sizes and other codes."""

from maskdm_fast.models.convert import OfficialWeights, convert_official, is_official, load_official
from maskdm_fast.models.sizes import CONFIGS
from maskdm_fast.models.transfer import TRANSFERABLE, changed_fields, transfer
from maskdm_fast.models.uvit import UViT, UViTConfig

__all__ = [
    "CONFIGS",
    "TRANSFERABLE",
    "OfficialWeights",
    "UViT",
    "UViTConfig",
    "changed_fields",
    "convert_official",
    "is_official",
    "load_official",
    "transfer",
]
