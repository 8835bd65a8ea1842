"""Values and energies of images for DxMI, called as ``value(x, index) -> [B]`` on patch vectors ``[B, N, P*P*C]``."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.diffusion import unpatchify
from maskdm_fast.distill.dxmi_networks import init_uniform
from maskdm_fast.models.layers import Block, LayerNorm, Linear, timestep_embedding
from maskdm_fast.random import Stream

_SLOPE = 0.2
"""Of the leaky rectifiers."""
_SIDE = 32
"""Side in pixels for which the published network adds its features up."""


class _ResidualBlock(nn.Module):
    """``leaky(pool(conv(leaky(conv(x))) + skip(x)))``; the skip is a 1x1 convolution where width or size changes."""

    def __init__(self, num_in: int, num_out: int, *, halve: bool):
        super().__init__()
        self.conv1 = nn.utils.skip_init(nn.Conv2d, num_in, num_out, 3, padding=1)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, num_out, num_out, 3, padding=1)
        changes = halve or num_in != num_out
        self.skip = nn.utils.skip_init(nn.Conv2d, num_in, num_out, 1) if changes else nn.Identity()
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.leaky_relu(self.conv1(x), _SLOPE)) + self.skip(x)
        return F.leaky_relu(F.avg_pool2d(x, 2) if self.halve else x, _SLOPE)


class ResNetValue(nn.Module):
    """The residual network of DxMI, without any normalisation; it does not look at the time.

    A 3x3 convolution, six residual blocks that halve the image three times, the rectified features added up over the
    image (times ``32^2 / pixels``, so that their scale does not grow with the image), one linear value, one learned
    scale and shift. 5.13 M parameters at the published width.

    Args:
        image_size: side in pixels, a multiple of 8.
        patch_size: side P of the patches that x is made of.
        channels: C.
        width: channels of the first blocks, the later ones having twice as many.
        seed: of the initial weights.

    Raises:
        ValueError: if `image_size` is not a multiple of 8 or of `patch_size`.

    Source: the "IGEBM v2" network in the code of Yoon et al. (see `dxmi`), after Du and Mordatch, "Implicit Generation
    and Modeling with Energy-Based Models", NeurIPS 2019.
    """

    def __init__(self, image_size: int, patch_size: int, *, channels: int = 3, width: int = 128, seed: int = 0):
        super().__init__()
        if image_size < 8 or image_size % 8 or image_size % patch_size:
            raise ValueError(
                f"ResNetValue: image_size is {image_size}, want a multiple of 8 and of patch_size {patch_size}"
            )
        self._shape = (patch_size, image_size, image_size, channels)
        self._gain = _SIDE**2 / image_size**2
        self.stem = nn.utils.skip_init(nn.Conv2d, channels, width, 3, padding=1)
        widths = [width, width, width, 2 * width, 2 * width, 2 * width, 2 * width]
        self.blocks = nn.ModuleList(
            _ResidualBlock(widths[i], widths[i + 1], halve=i % 2 == 0) for i in range(len(widths) - 1)
        )
        self.head = Linear(2 * width, 1)
        self.scale = nn.Parameter(torch.ones(1))  # DeepSpeed takes no tensors without an axis
        self.shift = nn.Parameter(torch.zeros(1))
        init_uniform(self, seed)

    @property
    def flops(self) -> float:
        """Of a forward pass on one image: its matrix products and convolutions."""
        side = self._shape[1]
        total = 2.0 * side**2 * self.stem.weight.numel() + 2.0 * self.head.weight.numel()
        for block in self.blocks:
            layers = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
            total += 2.0 * side**2 * sum(layer.weight.numel() for layer in layers)
            side = side // 2 if block.halve else side
        return total

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        images = unpatchify(x.to(self.stem.weight.dtype), *self._shape)
        h = F.leaky_relu(self.stem(images), _SLOPE)
        for block in self.blocks:
            h = block(h)
        features = self._gain * F.relu(h).sum(dim=(2, 3))
        return self.scale * self.head(features).float()[:, 0] + self.shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTValueConfig:
    """Shape of a `ViTValue`.

    Args:
        image_size: side in pixels, a multiple of `patch_size`.
        patch_size: side P of the patches.
        channels: C.
        stem: channels of the first convolution.
        dim: width of the tokens, even and a multiple of `num_heads`.
        depth: blocks.
        num_heads: attention heads.
        num_times: T + 1 for a value that knows the time, 0 for one that does not.

    Raises:
        ValueError: if one does not divide another.
    """

    image_size: int
    patch_size: int
    channels: int = 3
    stem: int = 32
    dim: int = 256
    depth: int = 6
    num_heads: int = 4
    num_times: int = 0

    def __post_init__(self):
        if self.image_size % self.patch_size or self.dim % self.num_heads or self.dim % 2:
            raise ValueError(
                f"ViTValueConfig: want image_size {self.image_size} a multiple of patch_size {self.patch_size}, and "
                f"dim {self.dim} even and a multiple of num_heads {self.num_heads}"
            )


class ViTValue(nn.Module):
    """A value from transformer blocks: a 3x3 convolution, one that makes a token of every patch with one pixel around
    it, blocks, the mean token, one linear value, one learned scale and shift.

    The norms of the blocks hide how large x is, and a value has to rank noise levels: each token is also given the
    logarithm of the root mean square of its patch. The blocks start as the identity and the value as 0, inside the
    bounds of the energy. Attention makes spikes: clip the gradients of energy and value steps (0.1) and warm up.

    Args:
        config: the shape.
        seed: of the initial weights.
    """

    def __init__(self, config: ViTValueConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        dim, num_patches = config.dim, (config.image_size // config.patch_size) ** 2
        self.conv1 = nn.utils.skip_init(nn.Conv2d, config.channels, config.stem, 3, padding=1)
        self.conv2 = nn.utils.skip_init(
            nn.Conv2d, config.stem, dim, config.patch_size + 2, stride=config.patch_size, padding=1
        )
        self.amplitude = Linear(1, dim)
        self.positions = nn.Parameter(torch.empty(num_patches, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, 4 * dim, qkv_bias=True, skip=False) for _ in range(config.depth)
        )
        self.norm = LayerNorm(dim)
        self.head = Linear(dim, 1)
        self.scale = nn.Parameter(torch.ones(1))  # DeepSpeed takes no tensors without an axis
        self.shift = nn.Parameter(torch.zeros(1))
        self._reset_parameters(seed)

    @torch.no_grad()
    def _reset_parameters(self, seed: int) -> None:
        init_uniform(self, seed)
        names = [name for name, _ in self.named_parameters()]
        slots = torch.tensor([names.index("positions")])
        draws = random.normal(self.positions.numel(), seed=seed, stream=Stream.INIT, step=0, slots=slots)
        self.positions.copy_(0.02 * draws.view(self.positions.shape))
        for layer in [self.head, *(layer for block in self.blocks for layer in (block.attention.proj, block.mlp.fc2))]:
            layer.weight.zero_()
            layer.bias.zero_()

    @property
    def flops(self) -> float:
        """Of a forward pass on one image: its matrix products and convolutions."""
        config, num_patches = self.config, self.positions.shape[0]
        convolutions = config.image_size**2 * self.conv1.weight.numel() + num_patches * self.conv2.weight.numel()
        blocks = config.depth * num_patches * config.dim * (12 * config.dim + 2 * num_patches)
        return 2.0 * (convolutions + num_patches * config.dim + blocks + config.dim)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        config = self.config
        inputs = x.to(self.conv1.weight.dtype)
        images = unpatchify(inputs, config.patch_size, config.image_size, config.image_size, config.channels)
        tokens = self.conv2(F.leaky_relu(self.conv1(images), _SLOPE)).flatten(2).transpose(1, 2)  # [B, N, D]
        loudness = 0.5 * torch.log(x.float().square().mean(dim=2, keepdim=True) + 1e-12).to(inputs.dtype)
        h = tokens + self.amplitude(loudness) + self.positions.to(tokens.dtype)
        if config.num_times:
            # Spread over the range for which the sinusoids are made.
            time = timestep_embedding(index * (1000.0 / config.num_times), config.dim)
            h = h + time[:, None].to(h.dtype)
        for block in self.blocks:
            h = block(h)
        value = self.head(self.norm(h).mean(dim=1)).float()[:, 0]
        return self.scale * value + self.shift
