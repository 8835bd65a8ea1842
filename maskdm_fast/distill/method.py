"""What the methods of score distillation have in common, and when which network is updated."""

import dataclasses
from typing import Protocol

from torch import Tensor

from maskdm_fast.distill.networks import Networks


class Method(Protocol):
    """Losses of the two networks that are trained against each other. A method holds no state.

    Attributes:
        input_level: noise level of the generator's input in the published recipe.
        fake_updates: updates of the fake network for each of the generator's there.
        needs_images: whether the fake network's update needs images of the data set.
    """

    input_level: float = 2.5
    fake_updates: int = 1
    needs_images: bool

    def trains_generator(self, images_seen: int) -> bool:
        """Whether the generator is updated after so many images."""

    def fake_loss(
        self,
        networks: Networks,
        labels: Tensor | None,
        images: Tensor | None = None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of the fake network; the generator and the teacher get no gradient.

        Args:
            networks: the three.
            labels: int64 ``[B]``, of the images to be generated and, where the method needs images, of those; or None.
            images: ``[B, height, width, C]``, uint8 0..255 or floating point in [-1, 1].
            seed: run seed.
            step: number of this update among those of both networks, so that no two draw the same.
            slots: int64 ``[B]``, places in the global batch.

        Returns:
            ``loss``, a scalar with gradient, the mean of ``loss_per_image [B]`` (detached); the times ``t [B]``; and
            scalars by name.

        Raises:
            ValueError: if the method needs images and there are none.
        """

    def generator_loss(
        self,
        networks: Networks,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
        images_seen: int,
    ) -> dict[str, Tensor]:
        """Loss of the generator; teacher and fake hand gradients on and get none. Other arguments as of `fake_loss`.

        Args:
            images_seen: progress, for what sets in later.

        Returns:
            As `fake_loss`; also ``distance_per_image [B]``, the mean square of the difference between the estimates of
            teacher and fake, which does fall as the generator becomes better; and ``finite_share``, a scalar, the
            share of images without a value that is no number. The others have loss 0, and so has their gradient at the
            generator's output; where the generator itself has overflowed, its derivative makes NaN of that
            (`networks.clean_gradients`).
        """


@dataclasses.dataclass(frozen=True)
class Alternation:
    """In each step an update of the fake network; in every step number `fake_updates`, after it, one of the generator.

    Raises:
        ValueError: if `fake_updates` is less than 1: the generator of a fake network that equals the teacher has no
            gradient.
    """

    fake_updates: int = 1

    def __post_init__(self):
        if self.fake_updates < 1:
            raise ValueError(f"fake_updates is {self.fake_updates}, want at least 1")

    def trains_generator(self, step: int) -> bool:
        """Whether the generator is updated in the step that follows `step` finished ones."""
        return (step + 1) % self.fake_updates == 0

    def fake_number(self, step: int) -> int:
        """The number of the fake network's update in `step`, among all updates of both networks."""
        return 2 * step

    def generator_number(self, step: int) -> int:
        """That of the generator's update."""
        return 2 * step + 1
