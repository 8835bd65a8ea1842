"""Named model sizes."""

from maskdm_fast.models.uvit import UViTConfig

CONFIGS: dict[str, UViTConfig] = {
    "emoji32": UViTConfig(image_size=32, patch_size=4, dim=192, depth=7, num_heads=3),
    "small64": UViTConfig(image_size=64, patch_size=4, dim=512, depth=13, num_heads=8),
    "small128": UViTConfig(image_size=128, patch_size=4, dim=512, depth=13, num_heads=8),
    "small256": UViTConfig(image_size=256, patch_size=4, dim=512, depth=13, num_heads=8),
    "base256": UViTConfig(image_size=256, patch_size=4, dim=768, depth=12, num_heads=12),
}
"""The sizes of MaskDM (44.3, 44.7, 46.3 and 102.4 million parameters), and one that trains on a CPU (3.4 million)."""
