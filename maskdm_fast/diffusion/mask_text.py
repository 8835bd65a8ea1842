"""The text forms of masks and their schedules, for command lines and configuration files."""

import re

from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import BlockMask, CropMask, Mask, NoMask, PatchMask

MASK_SYNTAX = "none|patch:RATIO|block:RATIO:SIDE|crop:SIDE"
MASK_SCHEDULE_SYNTAX = "constant|{steps,linear,cosine}:RATIO@IMAGES[,RATIO@IMAGES...]"


def parse_mask(text: str) -> Mask:
    """Read a mask from its text form, for example ``patch:0.9``, ``block:0.5-0.9:4``, ``crop:5`` or ``none``.

    RATIO is the share of patches masked, in [0, 1), or a range LOW-HIGH from which each image draws its own; SIDE the
    side in patches of a block, or of the window that is kept.

    Raises:
        ValueError: `text` is none of these.
    """
    kind, *values = text.split(":")
    try:
        if kind == "none" and not values:
            return NoMask()
        if kind == "patch" and len(values) == 1:
            ratio, max_ratio = _ratios(values[0])
            return PatchMask(ratio, max_ratio)
        if kind == "block" and len(values) == 2:
            ratio, max_ratio = _ratios(values[0])
            return BlockMask(ratio, int(values[1]), max_ratio)
        if kind == "crop" and len(values) == 1:
            return CropMask(int(values[0]))
    except ValueError as error:
        raise ValueError(f"mask {text!r}: {error}; want {MASK_SYNTAX}, RATIO a number or LOW-HIGH") from None
    raise ValueError(
        f"mask {text!r} is not understood; want {MASK_SYNTAX}, for example patch:0.9, patch:0.5-0.9 or block:0.9:4"
    )


def format_mask(mask: Mask) -> str:
    """The text form of `mask`, which `parse_mask` reads back."""
    if isinstance(mask, CropMask):
        return f"crop:{mask.size}"
    if isinstance(mask, NoMask):
        return "none"
    ratio = str(mask.ratio) if mask.max_ratio is None else f"{mask.ratio}-{mask.max_ratio}"
    return f"patch:{ratio}" if isinstance(mask, PatchMask) else f"block:{ratio}:{mask.block_size}"


def parse_mask_schedule(text: str) -> MaskSchedule:
    """Read a schedule from its text form, for example ``linear:0@200000`` or ``steps:0.5@100000,0@150000``.

    RATIO is the share of patches masked once IMAGES images are done; before the first knot it is that of the mask.

    Raises:
        ValueError: `text` is none of these.
    """
    kind, _, knots = text.partition(":")
    try:
        return MaskSchedule(kind, tuple(_knot(knot) for knot in knots.split(",")) if knots else ())
    except ValueError as error:
        raise ValueError(
            f"mask schedule {text!r}: {error}; want {MASK_SCHEDULE_SYNTAX}, for example linear:0@200000"
        ) from None


def format_mask_schedule(schedule: MaskSchedule) -> str:
    """The text form of `schedule`, which `parse_mask_schedule` reads back."""
    knots = ",".join(f"{ratio}@{images}" for ratio, images in schedule.knots)
    return f"{schedule.kind}:{knots}" if knots else schedule.kind


def _ratios(text: str) -> tuple[float, float | None]:
    """A number, or two with a dash between them; the dash of 1e-05 is none."""
    low, *high = re.split(r"(?<=[\d.])-", text, maxsplit=1)
    return float(low), float(high[0]) if high else None


def _knot(text: str) -> tuple[float, int]:
    ratio, at, images = text.partition("@")
    if not at:
        raise ValueError(f"{text!r} has no @")
    return float(ratio), int(images)
