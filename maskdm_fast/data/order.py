"""The order in which images are visited: a pure function of the seed and of how many images were consumed."""

import torch
from torch import Tensor

from maskdm_fast import random


class DataOrder:
    """Endless order over a data set, every image once per epoch.

    Position p (images consumed so far by the whole run, over all ranks) belongs to epoch ``p // n`` and shows image
    ``permutation_epoch[p % n]``, where the permutation is drawn from ``Stream.DATA_ORDER`` at step = epoch. A run that
    resumes at p, or that splits its batch over more ranks, sees the same images.

    Args:
        num_images: n, at least 1.
        seed: run seed, ``0 <= seed < 2**63``.

    Raises:
        ValueError: `num_images` or `seed` is out of range.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, want at least 1")
        self.num_images = num_images
        self.seed = random.check_seed(seed)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._permutation = random.permutation(
                self.num_images, seed=self.seed, stream=random.Stream.DATA_ORDER, step=epoch
            )
            self._epoch = epoch
        return self._permutation

    def indices(self, position: int, count: int) -> Tensor:
        """Images at positions ``position .. position + count - 1``; a batch may straddle epochs.

        Args:
            position: images consumed before this batch, >= 0.
            count: images wanted, >= 0.

        Returns:
            int64 ``[count]`` with values in ``[0, num_images)``.

        Raises:
            ValueError: `position` or `count` is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position is {position} and count is {count}, want both >= 0")
        parts = [torch.empty(0, dtype=torch.int64)]
        while count > 0:
            epoch, offset = divmod(position, self.num_images)
            taken = min(count, self.num_images - offset)
            parts.append(self._order_of(epoch)[offset : offset + taken])
            position, count = position + taken, count - taken
        return torch.cat(parts)
