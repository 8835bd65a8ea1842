"""Named model sizes."""

from maskdm_fast.models.uvit import UViTConfig


def _uvit(image_size: int, patch_size: int, dim: int, depth: int, num_heads: int, **options) -> UViTConfig:
    """The original U-ViT, which ends with a convolution unless `options` say otherwise."""
    return UViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        **{"final_conv": True, **options},
    )


_LATENTS = {"channels": 4, "num_classes": 1000}

CONFIGS: dict[str, UViTConfig] = {
    "emoji32": UViTConfig(image_size=32, patch_size=4, dim=192, depth=7, num_heads=3),
    "small64": UViTConfig(image_size=64, patch_size=4, dim=512, depth=13, num_heads=8),
    "small128": UViTConfig(image_size=128, patch_size=4, dim=512, depth=13, num_heads=8),
    "small256": UViTConfig(image_size=256, patch_size=4, dim=512, depth=13, num_heads=8),
    "base256": UViTConfig(image_size=256, patch_size=4, dim=768, depth=12, num_heads=12),
    "uvit-small32": _uvit(32, 2, 512, 12, 8),
    "uvit-small64": _uvit(64, 4, 512, 12, 8),
    "uvit-mid64": _uvit(64, 4, 768, 16, 12, num_classes=1000),
    "uvit-large64": _uvit(64, 4, 1024, 20, 16, num_classes=1000),
    "uvit-large-latent32": _uvit(32, 2, 1024, 20, 16, **_LATENTS),
    "uvit-large-latent64": _uvit(64, 4, 1024, 20, 16, **_LATENTS),
    "uvit-huge-latent32": _uvit(32, 2, 1152, 28, 16, final_conv=False, **_LATENTS),
    "uvit-huge-latent64": _uvit(64, 4, 1152, 28, 16, final_conv=False, **_LATENTS),
}
"""One that trains on a CPU (3.4 million parameters); the sizes of MaskDM (44.3, 44.7, 46.3 and 102.4 million); those of
the original U-ViT (S 44, M 131, L 287, H 501 million). Latents of 32 and 64 stand for images of 256 and 512 px."""
