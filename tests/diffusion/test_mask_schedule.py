import itertools
import math

import pytest

from maskdm_fast.diffusion import BlockMask, CropMask, MaskSchedule, NoMask, PatchMask
from maskdm_fast.diffusion.mask_schedule import MAX_STAIR
from maskdm_fast.diffusion.mask_text import (
    format_mask,
    format_mask_schedule,
    parse_mask,
    parse_mask_schedule,
)

GRID = (16, 16)


def ratios(text: str, first: float, images: range) -> list[float]:
    return [parse_mask_schedule(text).ratio_at(first, done) for done in images]


def test_steps_change_at_their_images():
    assert ratios("steps:0.5@100,0@150", 0.9, range(98, 102)) == [0.9, 0.9, 0.5, 0.5]
    assert ratios("steps:0.5@100,0@150", 0.9, range(148, 152)) == [0.5, 0.5, 0.0, 0.0]
    assert ratios("steps:0.5@100,0@150", 0.9, range(10**9, 10**9 + 1)) == [0.0]


def test_constant_is_the_ratio_of_the_mask():
    for mask in (NoMask(), PatchMask(0.9), BlockMask(0.5, 2, 0.9), CropMask(2)):
        assert MaskSchedule().mask_at(mask, 10**9) == mask


@pytest.mark.parametrize(
    ("kind", "curve"), [("linear", lambda p: p), ("cosine", lambda p: (1 - math.cos(math.pi * p)) / 2)]
)
def test_ramps_follow_their_curve_in_stairs(kind, curve):
    """Flat to 0.9 at 1000 images, down to 0.3 at 5000, up to 0.4 at 6000, and there it stays."""
    text = f"{kind}:0.9@1000,0.3@5000,0.4@6000"
    values = ratios(text, 0.9, range(7001))
    assert set(values[:1001]) == {0.9} and values[5000] == 0.3 and set(values[6000:]) == {0.4}
    for begin, end, first, last in ((1000, 5000, 0.9, 0.3), (5000, 6000, 0.3, 0.4)):
        stairs = values[begin : end + 1]
        exact = [first + (last - first) * curve(i / (end - begin)) for i in range(end - begin + 1)]
        assert max(abs(a - b) for a, b in zip(stairs, exact, strict=True)) <= MAX_STAIR / 2 + 1e-12
        assert stairs == sorted(stairs, reverse=last < first)
        heights = {round(abs(b - a), 12) for a, b in itertools.pairwise(stairs)} - {0.0}
        assert len(heights) == 1 and max(heights) <= MAX_STAIR
        assert len(set(stairs)) == math.ceil(abs(last - first) / MAX_STAIR) + 1


def test_shapes_do_not_change_every_step():
    masks = [parse_mask_schedule("linear:0@200000").mask_at(PatchMask(0.9), done) for done in range(0, 200_001, 64)]
    counts = [mask.num_visible(GRID) for mask in masks]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (26, 256)
    assert len(set(counts)) == 30


def test_the_kind_of_mask_stays():
    schedule = parse_mask_schedule("steps:0.5@100")
    assert schedule.mask_at(BlockMask(0.9, 4), 99) == BlockMask(0.9, 4)
    assert schedule.mask_at(BlockMask(0.9, 4), 100) == BlockMask(0.5, 4)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant", MaskSchedule()),
        ("linear:0.0@200000", MaskSchedule("linear", ((0.0, 200_000),))),
        ("cosine:0.9@1000,0.25@200000", MaskSchedule("cosine", ((0.9, 1000), (0.25, 200_000)))),
        ("steps:1e-05@7", MaskSchedule("steps", ((1e-5, 7),))),
    ],
)
def test_text_round_trip(text, schedule):
    assert parse_mask_schedule(text) == schedule
    assert format_mask_schedule(schedule) == text


def test_text_takes_whole_ratios_and_grouped_digits():
    assert parse_mask_schedule("linear:0@200_000") == MaskSchedule("linear", ((0.0, 200_000),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kind is '', want one of constant, steps"),
        ("ramp:0@10", "kind is 'ramp'"),
        ("linear", "linear has 0 knots, want at least one knot RATIO@IMAGES"),
        ("constant:0@10", "constant has 1 knots, want no knots"),
        ("linear:0", "'0' has no @"),
        ("linear:0@10,", "'' has no @"),
        ("linear:x@10", "could not convert string to float: 'x'"),
        ("linear:0@1e5", "invalid literal for int"),
        ("linear:1@10", "a ratio is 1.0, want 0 <= ratio < 1"),
        ("steps:-0.5@10", "a ratio is -0.5"),
        ("steps:nan@10", "a ratio is nan"),
        ("steps:0.5@0", r"knots lie at \[0\] images, want rising numbers above 0"),
        ("steps:0.5@10,0@10", r"knots lie at \[10, 10\] images"),
    ],
)
def test_bad_text_says_what_is_wanted(text, message):
    with pytest.raises(ValueError, match=rf"mask schedule '{text}': .*{message}.*; want constant\|"):
        parse_mask_schedule(text)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (NoMask(), r"which patch:RATIO and block:RATIO:SIDE have; this mask is NoMask\(\)"),
        (CropMask(3), r"this mask is CropMask\(size=3\)"),
        (PatchMask(0.5, 0.9), "sets one ratio for the whole batch, but each image of PatchMask"),
    ],
)
def test_masks_without_one_ratio_are_refused(mask, message):
    schedule = parse_mask_schedule("linear:0@10")
    for call in (lambda: schedule.validate(mask), lambda: schedule.mask_at(mask, 0)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("patch:0.5-0.9", PatchMask(0.5, 0.9)),
        ("block:0.25-0.75:4", BlockMask(0.25, 4, 0.75)),
        ("patch:1e-05", PatchMask(1e-5)),
        ("patch:1e-05-0.5", PatchMask(1e-5, 0.5)),
    ],
)
def test_ranges_of_ratios_in_text(text, mask):
    assert parse_mask(text) == mask
    assert format_mask(mask) == text


@pytest.mark.parametrize("text", ["patch:0.9-0.5", "patch:0.5-", "patch:0.5-0.7-0.9", "block:0.5-1.0:2", "crop:2-3"])
def test_bad_ranges(text):
    with pytest.raises(ValueError, match="RATIO a number or LOW-HIGH"):
        parse_mask(text)
