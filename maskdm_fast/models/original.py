"""The parts that the original U-ViT has and MaskDM's does not need; `UViTConfig` switches each on by itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm_fast.models.layers import Linear


class TimeMLP(nn.Module):
    """``Linear(D, 4D)``, SiLU, ``Linear(4D, D)`` on the sinusoidal embedding of the time.

    Source: ``mlp_time_embed`` of github.com/baofff/U-ViT, libs/uvit.py.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class FinalConv(nn.Module):
    """A 3x3 convolution on the image that the predicted patches make up; zeros lie around it.

    It reads across the borders of patches, so it needs all of them. `UViT.reset_parameters` starts it as the identity:
    a network without it and the same network with a new one compute the same function.

    Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023, figure 1.
    """

    def __init__(self, grid_side: int, patch_size: int, channels: int):
        super().__init__()
        self._shape = (grid_side, grid_side, patch_size, patch_size, channels)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map patch vectors ``[B, N, P*P*C]``, all of them in order, to the same shape."""
        rows, columns, patch, _, channels = self._shape
        image = tokens.unflatten(2, self._shape[2:]).unflatten(1, self._shape[:2])
        image = image.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch, columns * patch)
        image = F.conv2d(image, self.weight, self.bias, padding=1)
        image = image.view(-1, channels, rows, patch, columns, patch)
        return image.permute(0, 2, 4, 3, 5, 1).reshape(tokens.shape)

    def identity(self) -> Tensor:
        """The weight under which the convolution changes nothing, on the CPU."""
        weight = torch.zeros(self.weight.shape, device="cpu")
        weight[:, :, 1, 1].fill_diagonal_(1.0)
        return weight
