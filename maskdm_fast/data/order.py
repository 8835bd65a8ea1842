"""The order in which images are visited: a pure function of the seed and of how many images were consumed."""

import torch
from torch import Tensor

from maskdm_fast import random


class DataOrder:
    """Endless order over a data set, every image once per epoch unless classes are balanced.

    Position p (images consumed so far by the whole run, over all ranks) belongs to epoch ``p // n`` and shows image
    ``order_epoch[p % n]``, where the order is drawn from ``Stream.DATA_ORDER`` at step = epoch. A run that resumes at
    p, or that splits its batch over more ranks, sees the same images.

    With `class_balance` w, class c with n_c of the n images gets the share ``n_c^(1-w) / sum_k n_k^(1-w)`` of every
    epoch, divided evenly among its images: w = 0 is their natural share, w = 1 the same for all classes. An epoch is a
    systematic sample: images stand in line by class, shuffled within it, each as long as the number of times it is
    wanted, and n evenly spaced points with one random offset pick them. So in every epoch the count of each class and
    of each image is its expectation rounded down or up.

    Args:
        num_images: n, at least 1.
        seed: run seed, ``0 <= seed < 2**63``.
        labels: int64 ``[n]``, the class of every image; needed where `class_balance` is not 0.
        class_balance: w, 0 to 1.

    Raises:
        ValueError: a value is out of range, or there are no classes to balance.

    Source: Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics, 1949.
    """

    def __init__(self, num_images: int, seed: int, *, labels: Tensor | None = None, class_balance: float = 0.0) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, want at least 1")
        if not 0.0 <= class_balance <= 1.0:
            raise ValueError(f"class_balance is {class_balance}, want 0 (natural shares) to 1 (equal shares)")
        self.num_images = num_images
        self.seed = random.check_seed(seed)
        self._labels = self._times = None
        if class_balance > 0.0:
            if labels is None or len(labels) != num_images or int(labels.min()) < 0:
                raise ValueError(
                    f"class_balance is {class_balance}, but not every image has a class; want class_balance 0, or a "
                    "data set with classes"
                )
            self._labels, self._times = labels, _times_per_epoch(labels, class_balance)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = self._permutation(epoch) if self._labels is None else self._balanced(epoch)
            self._epoch = epoch
        return self._order

    def _permutation(self, epoch: int) -> Tensor:
        return random.permutation(self.num_images, seed=self.seed, stream=random.Stream.DATA_ORDER, step=epoch)

    def _balanced(self, epoch: int) -> Tensor:
        draw = {"seed": self.seed, "stream": random.Stream.DATA_ORDER, "step": epoch}
        shuffled = self._permutation(epoch)
        line = shuffled[torch.argsort(self._labels[shuffled], stable=True)]
        offset = random.uniform(1, slots=torch.tensor([1]), **draw).double()[0]
        points = torch.arange(self.num_images, dtype=torch.float64) + offset
        # The clamp is for the last sum, which rounding may leave a little below n.
        places = torch.searchsorted(self._times[line].cumsum(0), points, right=True).clamp(max=self.num_images - 1)
        words = random.bits(self.num_images, slots=torch.tensor([2]), **draw)[0]
        return line[places][torch.argsort(words, stable=True)]

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


def _times_per_epoch(labels: Tensor, class_balance: float) -> Tensor:
    """How often each image is wanted per epoch, float64 ``[n]`` with sum n."""
    sizes = labels.bincount().double()
    # A label that no image has must not get a share: 0 ** 0 is 1.
    shares = torch.where(sizes > 0, sizes ** (1.0 - class_balance), 0.0)
    per_image = shares / shares.sum() / sizes.clamp(min=1.0)
    return len(labels) * per_image[labels]
