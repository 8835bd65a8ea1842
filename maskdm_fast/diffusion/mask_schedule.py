"""How the share of masked patches changes while a run goes on."""

import dataclasses
import itertools
import math

from maskdm_fast.diffusion.masking import BlockMask, Mask, PatchMask

MAX_STAIR = 1 / 32
"""The most by which a ramp moves the ratio at once."""

KINDS = ("constant", "steps", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class MaskSchedule:
    """The mask ratio as a function of the images done: one ratio for each optimizer step, so batches stay dense.

    A run begins with the ratio of its mask, at image 0, and reaches the ratio of each knot at its image; after the last
    knot it stays. Between two knots, at share p of the way from ratio a to b,

        steps:  a    linear:  a + (b - a) p    cosine:  a + (b - a) (1 - cos(pi p)) / 2

    A ramp is a stair of n equal stairs, the least number of which none is higher than `MAX_STAIR`, and takes the one
    nearest to the curve: every new ratio is a new shape, which a compiled step, a CUDA graph or a memory pool pays for.
    From 0.9 to 0 these are 30 shapes.

    Images are counted from the beginning of the run and not as a share of it, so that a finished run may be continued
    without a change to its past.

    Args:
        kind: ``constant``, ``steps``, ``linear`` or ``cosine``.
        knots: (ratio, images) of each, ``0 <= ratio < 1``, images rising and at least 1; none for ``constant``.

    Raises:
        ValueError: if a value is none of these.
    """

    kind: str = "constant"
    knots: tuple[tuple[float, int], ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"MaskSchedule: kind is {self.kind!r}, want one of {', '.join(KINDS)}")
        if (self.kind == "constant") != (not self.knots):
            wanted = "no knots" if self.kind == "constant" else "at least one knot RATIO@IMAGES"
            raise ValueError(f"MaskSchedule: kind {self.kind} has {len(self.knots)} knots, want {wanted}")
        for ratio, _ in self.knots:
            if not 0.0 <= ratio < 1.0:
                raise ValueError(f"MaskSchedule: a ratio is {ratio}, want 0 <= ratio < 1 (the share of masked patches)")
        images = [0, *(images for _, images in self.knots)]
        if any(late <= early for early, late in itertools.pairwise(images)):
            raise ValueError(
                f"MaskSchedule: the knots lie at {images[1:]} images, want rising numbers above 0 (at 0 images the "
                "ratio is that of the mask)"
            )

    def validate(self, mask: Mask) -> None:
        """Raise ValueError unless `mask` has the one ratio that the schedule moves."""
        if self.knots and not isinstance(mask, PatchMask | BlockMask):
            raise ValueError(
                "the mask schedule moves the ratio of a mask, which patch:RATIO and block:RATIO:SIDE have; this mask "
                f"is {mask}"
            )
        if self.knots and mask.varies:
            raise ValueError(
                f"the mask schedule sets one ratio for the whole batch, but each image of {mask} has its own; give the "
                "mask a single ratio, or leave the schedule out"
            )

    def ratio_at(self, first: float, images: int) -> float:
        """The ratio when `images` images are done, in a run that began with ratio `first`."""
        begin = 0
        for ratio, end in self.knots:
            if images < end:
                return first if self.kind == "steps" else self._ramp(first, ratio, (images - begin) / (end - begin))
            first, begin = ratio, end
        return first

    def mask_at(self, mask: Mask, images: int) -> Mask:
        """The mask of the optimizer step that begins when `images` images are done, in a run that began with `mask`.

        Raises:
            ValueError: if the schedule moves a ratio and `mask` has none, or one per image.
        """
        self.validate(mask)
        if not isinstance(mask, PatchMask | BlockMask) or not self.knots:
            return mask
        return dataclasses.replace(mask, ratio=self.ratio_at(mask.ratio, images))

    def _ramp(self, first: float, last: float, share: float) -> float:
        curve = share if self.kind == "linear" else (1.0 - math.cos(math.pi * share)) / 2
        stairs = math.ceil(abs(last - first) / MAX_STAIR)
        if not stairs:
            return first
        climbed = math.floor(curve * stairs + 0.5) / stairs
        return (1.0 - climbed) * first + climbed * last  # exact at both ends
