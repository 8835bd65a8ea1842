"""Where the tokens of images of unequal lengths lie in one packed sequence."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Packing:
    """The extras of each image in front of its patches, image after image, without padding.

        [extras of 0, patches of 0, extras of 1, patches of 1, ...],  B E + T tokens

    Attributes:
        cu_seqlens: int32 ``[B + 1]``, where each image begins, extras counted.
        extras_at: int64 ``[B, E]``, places of the extras.
        patches_at: int64 ``[T]``, places of the patches.
    """

    cu_seqlens: Tensor
    extras_at: Tensor
    patches_at: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, num_extras: int, num_patches: int) -> "Packing":
        """Lay out images whose patches alone begin at `cu_seqlens`, int32 ``[B + 1]``, and number `num_patches`, T.

        T is known from the shape of the tokens, so nothing here waits for the device.
        """
        device = cu_seqlens.device
        before = num_extras * torch.arange(cu_seqlens.shape[0], device=device)  # extras before each image, [B + 1]
        extras_at = (cu_seqlens[:-1] + before[:-1])[:, None] + torch.arange(num_extras, device=device)
        shift = before[1:].repeat_interleave(cu_seqlens.diff(), output_size=num_patches)
        return cls(
            cu_seqlens + before.to(torch.int32),
            extras_at,
            torch.arange(num_patches, device=device) + shift,
        )

    def join(self, extras: Tensor, patches: Tensor) -> Tensor:
        """Put extras ``[B, E, D]`` and patches ``[T, D]`` into one sequence, ``[B E + T, D]``."""
        rows = torch.cat((extras.flatten(0, 1), patches))
        places = torch.cat((self.extras_at.flatten(), self.patches_at))
        return torch.empty_like(rows).index_copy(0, places, rows)

    def patches(self, x: Tensor) -> Tensor:
        """The patches of a sequence ``[B E + T, D]``, ``[T, D]``."""
        return x.index_select(0, self.patches_at)
