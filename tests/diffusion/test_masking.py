import dataclasses

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import BlockMask, CropMask, NoMask, PatchMask
from maskdm_fast.random import Stream

GRID_16, GRID_64 = (16, 16), (64, 64)
COUNTS = [
    *[(PatchMask(ratio), GRID_16, count) for ratio, count in ((0.1, 231), (0.5, 128), (0.9, 26))],
    *[(BlockMask(ratio, 2), GRID_16, count) for ratio, count in ((0.1, 232), (0.5, 128), (0.9, 28))],
    *[(BlockMask(ratio, 4), GRID_16, count) for ratio, count in ((0.1, 240), (0.5, 128), (0.9, 32))],
    *[(BlockMask(ratio, 8), GRID_16, count) for ratio, count in ((0.5, 128), (0.9, 64))],
    *[(PatchMask(ratio), GRID_64, count) for ratio, count in ((0.1, 3687), (0.5, 2048), (0.9, 410))],
    *[(BlockMask(ratio, 2), GRID_64, count) for ratio, count in ((0.1, 3688), (0.5, 2048), (0.9, 412))],
    *[(BlockMask(ratio, 4), GRID_64, count) for ratio, count in ((0.1, 3696), (0.5, 2048), (0.9, 416))],
    *[(BlockMask(ratio, 8), GRID_64, count) for ratio, count in ((0.1, 3712), (0.5, 2048), (0.9, 448))],
    *[(CropMask(size), GRID_16, count) for size, count in ((15, 225), (11, 121), (5, 25))],
    (PatchMask(0.5), (3, 5), 8),
    (BlockMask(0.5, 2), (4, 6), 12),
    (CropMask(3), (3, 5), 9),
]


def sample(mask, grid, num, *, seed=0, step=0, first=0):
    return mask.sample(grid, seed=seed, step=step, slots=torch.arange(first, first + num))


def test_one_patch_is_always_visible():
    ratio = 1 - 2**-53
    assert all(PatchMask(ratio).num_visible((1, columns)) == 1 for columns in range(1, 300))
    assert BlockMask(ratio, 3).num_visible((9, 6)) == 9


@pytest.mark.parametrize(("mask", "grid", "count"), COUNTS, ids=str)
def test_counts(mask, grid, count):
    assert mask.num_visible(grid) == count
    ids_keep = sample(mask, grid, 3)
    assert ids_keep.shape == (3, count) and ids_keep.dtype == torch.int64
    assert (ids_keep.diff(dim=1) > 0).all()
    assert ids_keep.min() >= 0 and ids_keep.max() < grid[0] * grid[1]
    assert not mask.varies


@pytest.mark.parametrize(
    ("mask", "grid"), [(NoMask(), (3, 5)), (PatchMask(0.0), GRID_16), (BlockMask(0.1, 8), GRID_16)], ids=str
)
def test_all_patches_in_order_need_no_indices(mask, grid):
    total = grid[0] * grid[1]
    assert mask.num_visible(grid) == total
    assert sample(mask, grid, 2) is None
    ids_keep, cu_seqlens = mask.sample_packed(grid, seed=0, step=0, slots=torch.arange(2))
    assert torch.equal(ids_keep, torch.arange(total).repeat(2))
    assert cu_seqlens.tolist() == [0, total, 2 * total] and cu_seqlens.dtype == torch.int32


def test_smallest_words_are_visible():
    """The contract of the draws, spelled out: a kernel that draws masks itself has to agree with it."""
    words = random.bits(15, seed=9, stream=Stream.MASK, step=4, slots=torch.arange(20, 26)).tolist()
    expected = [sorted(sorted(range(15), key=lambda n, row=row: (row[n], n))[:8]) for row in words]
    assert sample(PatchMask(0.5), (3, 5), 6, seed=9, step=4, first=20).tolist() == expected


def test_ties_go_to_the_lower_index(monkeypatch):
    top = 2**32 - 1
    monkeypatch.setattr(random, "bits", lambda num, **_: torch.tensor([[top] * num, [top] * (num - 1) + [0]]))
    assert PatchMask(0.5).sample((2, 3), seed=0, step=0, slots=torch.arange(2)).tolist() == [[0, 1, 2], [0, 1, 5]]


def test_blocks_are_whole_and_drawn_per_block():
    rows, columns, side = 6, 8, 2
    ids_keep = sample(BlockMask(0.5, side), (rows, columns), 5, seed=1)
    words = random.bits(12, seed=1, stream=Stream.MASK, step=0, slots=torch.arange(5)).tolist()
    for ids, row in zip(ids_keep.tolist(), words, strict=True):
        blocks = {n // columns // side * (columns // side) + n % columns // side for n in ids}
        assert blocks == set(sorted(range(12), key=row.__getitem__)[:6])
        assert len(ids) == len(blocks) * side**2


@pytest.mark.parametrize("mask", [PatchMask(0.7), BlockMask(0.7, 2)], ids=lambda mask: type(mask).__name__)
def test_each_patch_is_visible_equally_often(mask):
    grid, num = (4, 6), 8000
    share = mask.num_visible(grid) / 24
    frequency = torch.bincount(sample(mask, grid, num).flatten(), minlength=24) / num
    assert (frequency - share).abs().max() < 5 * (share * (1 - share) / num) ** 0.5


def test_crop_windows_are_squares_and_uniform():
    grid, size, num = (5, 7), 3, 15000
    ids_keep = sample(CropMask(size), grid, num)
    corner = ids_keep[:, 0]
    expected = [row * 7 + column for row in range(size) for column in range(size)]
    assert torch.equal(ids_keep - corner[:, None], torch.tensor(expected).expand(num, -1))
    places = torch.bincount(corner // 7 * 5 + corner % 7, minlength=15)
    assert places.shape == (15,)
    probability = 1 / 15
    assert (places / num - probability).abs().max() < 5 * (probability * (1 - probability) / num) ** 0.5


def test_crop_stays_inside_at_the_largest_draw(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda num, **_: torch.full((1, num), 1 - 2.0**-24))
    for side in (3, 5, 7, 11, 1000):
        ids_keep = CropMask(1).sample((side, side), seed=0, step=0, slots=torch.zeros(1, dtype=torch.int64))
        assert ids_keep.item() == side * side - 1


@pytest.mark.parametrize("mask", [PatchMask(0.5), BlockMask(0.5, 2), CropMask(2)], ids=lambda mask: type(mask).__name__)
def test_draws_depend_on_seed_step_and_slot_only(mask):
    grid = (4, 4)
    whole = sample(mask, grid, 64, seed=3, step=torch.tensor(7))
    halves = torch.cat([sample(mask, grid, 32, seed=3, step=7), sample(mask, grid, 32, seed=3, step=7, first=32)])
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, sample(mask, grid, 64, seed=4, step=7))
    assert not torch.equal(whole, sample(mask, grid, 64, seed=3, step=8))
    assert sample(mask, grid, 0).shape == (0, mask.num_visible(grid))


RANGES = [PatchMask(0.3, 0.8), BlockMask(0.3, 2, 0.8)]
PACKABLE = [PatchMask(0.5), BlockMask(0.5, 2), CropMask(2), *RANGES]


def images_of(ids_keep, cu_seqlens):
    return [ids.tolist() for ids in ids_keep.tensor_split(cu_seqlens[1:-1].long())]


@pytest.mark.parametrize("mask", PACKABLE, ids=str)
def test_packed_draws_depend_on_seed_step_and_slot_only(mask):
    def draw(first, last, seed=3, step=7):
        return images_of(*mask.sample_packed((4, 6), seed=seed, step=step, slots=torch.arange(first, last)))

    whole = draw(0, 64)
    assert len(whole) == 64 and draw(0, 20) + draw(20, 64) == whole
    assert draw(0, 64, seed=4) != whole and draw(0, 64, step=8) != whole
    ids_keep, cu_seqlens = mask.sample_packed((4, 6), seed=0, step=0, slots=torch.arange(0))
    assert ids_keep.shape == (0,) and cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("mask", [mask for mask in PACKABLE if not mask.varies], ids=str)
def test_packed_holds_what_the_dense_form_holds(mask):
    draw = {"seed": 3, "step": 7, "slots": torch.arange(5)}
    dense = mask.sample((4, 6), **draw)
    ids_keep, cu_seqlens = mask.sample_packed((4, 6), **draw)
    assert ids_keep.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
    assert torch.equal(ids_keep.view(5, -1), dense)
    assert cu_seqlens.tolist() == [image * dense.shape[1] for image in range(6)]


@pytest.mark.parametrize("mask", RANGES, ids=str)
def test_each_image_draws_its_own_ratio(mask):
    """The count follows the drawn ratio, and the patches are those of a mask with just that ratio."""
    grid, draw = (8, 6), {"seed": 3, "step": 7, "slots": torch.arange(200)}
    images = images_of(*mask.sample_packed(grid, **draw))
    u = random.uniform(1, stream=Stream.MASK_RATIO, **draw)[:, 0].tolist()
    for slot in range(200):
        single = dataclasses.replace(mask, ratio=0.3 + 0.5 * u[slot], max_ratio=None)
        assert images[slot] == sample(single, grid, 1, seed=3, step=7, first=slot)[0].tolist()
    counts = {len(ids) for ids in images}
    assert len(counts) > 4 and max(counts) <= mask.num_visible(grid)


def test_one_patch_is_visible_at_the_largest_draw(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda num, **_: torch.full((1, num), 1 - 2.0**-24))
    mask = PatchMask(0.0, 1 - 2**-53)
    for columns in range(1, 60):
        ids_keep, _ = mask.sample_packed((1, columns), seed=0, step=0, slots=torch.zeros(1, dtype=torch.int64))
        assert len(ids_keep) == 1


@pytest.mark.parametrize("mask", PACKABLE, ids=str)
def test_whole_images_keep_all_patches_and_change_no_other(mask):
    draw = {"seed": 3, "step": 7, "slots": torch.arange(6)}
    whole = torch.tensor([True, False, False, True, False, True])
    images, before = (images_of(*mask.sample_packed((4, 6), **draw, whole=w)) for w in (whole, None))
    for slot in range(6):
        assert images[slot] == (list(range(24)) if whole[slot] else before[slot])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchMask(1.0), "PatchMask: ratio is 1.0, want 0 <= ratio < 1"),
        (lambda: PatchMask(-0.1), "ratio is -0.1"),
        (lambda: PatchMask(float("nan")), "ratio is nan"),
        (lambda: PatchMask(0.5, 1.0), "PatchMask: max_ratio is 1.0, want a number above ratio, 0.5, and below 1"),
        (lambda: BlockMask(0.5, 2, 0.5), "BlockMask: max_ratio is 0.5"),
        (lambda: sample(PatchMask(0.5, 0.9), (4, 4), 1), "ratio 0.5 to 0.9.; use sample_packed"),
        (lambda: BlockMask(1.5, 2), "BlockMask: ratio is 1.5"),
        (lambda: BlockMask(0.5, 0), "block_size is 0, want at least 1"),
        (lambda: CropMask(0), "size is 0, want at least 1"),
        (lambda: BlockMask(0.5, 3).validate((6, 8)), "block_size 3 does not divide the grid of 6x8 patches"),
        (
            lambda: CropMask(5).validate((4, 8)),
            "5x5 patches does not fit into the grid of 4x8; want a size of at most 4",
        ),
        (lambda: NoMask().validate((0, 4)), r"grid is \(0, 4\)"),
        (lambda: PatchMask(0.5).validate((4,)), r"grid is \(4,\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *[(lambda mask=mask: sample(mask, 4, 1), "grid is of type int") for mask in (NoMask(), *PACKABLE[:3])],
        (lambda: sample(PatchMask(0.5), (4.0, 4.0), 1), "mask: a side of the grid is of type float, want an int"),
        (lambda: BlockMask(0.5, 2.0), "BlockMask: block_size is of type float, want an int"),
        (lambda: CropMask(2.0), "CropMask: size is of type float, want an int"),
        (lambda: PatchMask(0.5).sample(GRID_16, seed=0, step=0, slots=torch.zeros(2)), "slots has dtype float32"),
        (lambda: NoMask().sample_packed(GRID_16, seed=0, step=0, slots=[0]), "slots is of type list, want a tensor"),
    ],
)
def test_wrong_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()
