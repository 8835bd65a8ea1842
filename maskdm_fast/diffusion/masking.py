"""Which patches of an image are visible.

A mask with one ratio keeps the same number of patches in each image, so a batch has static shapes: ``sample`` returns
int64 ``ids_keep [B, K]``, ascending. A mask with a range of ratios draws one per image, and ``sample_packed`` lays the
images end to end: ``ids_keep [T]`` with ``cu_seqlens [B + 1]``, nothing padded. The number of masked patches is rounded
down, of blocks to whole blocks: compare runs by `num_visible`, not by their nominal ratio.

A grid is (rows, columns) in patches; token n lies at row ``n // columns``, column ``n % columns``. Draws are made on
the device of `slots`. From `Stream.MASK` each candidate gets one 32-bit word, and those with the smallest words are
visible, ties by index: an image keeps the same patches in both forms, and with more patches visible it keeps those of
before. Where each image has its own ratio, that comes from `Stream.MASK_RATIO`.

Source: Lei et al., "Masked Diffusion Models Are Fast Distribution Learners", arXiv 2306.11363.
"""

import dataclasses
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.ops.checks import check_int
from maskdm_fast.random import Stream

Grid: TypeAlias = tuple[int, int]


class _AnyMask:
    """What all masks share; `validate`, `num_visible` and `sample` are their own."""

    @property
    def varies(self) -> bool:
        """Whether images keep different numbers of patches, so that only `sample_packed` serves."""
        return False

    def sample_packed(
        self, grid: Grid, *, seed: int, step: int | Tensor, slots: Tensor, whole: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The visible patches of all images, end to end.

        The total is only known once the ratios are drawn, so on a GPU this waits for the device once.

        Args:
            grid: (rows, columns) in patches.
            seed: run seed.
            step: optimizer step.
            slots: int64 ``[B]``, places in the global batch.
            whole: bool ``[B]``, True for an image that keeps all its patches.

        Returns:
            ``(ids_keep, cu_seqlens)``: int64 ``[T]``, ascending within each image; int32 ``[B + 1]``, where each image
            begins.
        """
        random.check_slots(slots)
        visible = self._visible(grid, seed=seed, step=step, slots=slots)
        if whole is not None:
            visible = visible | whole[:, None]
        ends = visible.sum(dim=1).cumsum(dim=0)
        return visible.nonzero()[:, 1], F.pad(ends, (1, 0)).to(torch.int32)

    def _visible(self, grid: Grid, **draw) -> Tensor:
        """bool ``[B, N]``, True where a patch is visible."""
        shape = (draw["slots"].shape[0], grid[0] * grid[1])
        ids_keep = self.sample(grid, **draw)
        if ids_keep is None:
            return torch.ones(shape, dtype=torch.bool, device=draw["slots"].device)
        return torch.zeros(shape, dtype=torch.bool, device=ids_keep.device).scatter(1, ids_keep, True)


@dataclasses.dataclass(frozen=True)
class NoMask(_AnyMask):
    """Everything is visible; `sample` returns None, which stands for all patches in order."""

    def validate(self, grid: Grid) -> None:
        """Raise ValueError unless the grid has a patch."""
        _check_grid(grid)

    def num_visible(self, grid: Grid) -> int:
        """N, the patches of `grid`."""
        self.validate(grid)
        return grid[0] * grid[1]

    def sample(self, grid: Grid, *, seed: int, step: int | Tensor, slots: Tensor) -> None:
        """None: all patches in order."""
        self.validate(grid)


class _RatioMask(_AnyMask):
    """A share of equal pieces of the grid is masked: patches, or blocks of them."""

    ratio: float
    max_ratio: float | None
    _side: int  # of a piece, in patches

    def __post_init__(self):
        name = type(self).__name__
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"{name}: ratio is {self.ratio}, want 0 <= ratio < 1 (the share of masked patches)")
        if self.max_ratio is not None and not self.ratio < self.max_ratio < 1.0:
            raise ValueError(
                f"{name}: max_ratio is {self.max_ratio}, want a number above ratio, {self.ratio}, and below 1"
            )

    @property
    def varies(self) -> bool:
        """Whether images keep different numbers of patches, so that only `sample_packed` serves."""
        return self.max_ratio is not None

    def num_visible(self, grid: Grid) -> int:
        """K, at least one piece; with a range of ratios the most that an image keeps."""
        self.validate(grid)
        total, area = grid[0] * grid[1], self._side**2
        return total - int(self.ratio * total) // area * area

    def sample(self, grid: Grid, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor | None:
        """``ids_keep [B, K]`` of the images at `slots`, None if all patches are visible; not for a range of ratios."""
        if self.varies:
            raise ValueError(
                f"{type(self).__name__}: images keep different numbers of patches (ratio {self.ratio} to "
                f"{self.max_ratio}); use sample_packed"
            )
        keep, side, (rows, columns) = self.num_visible(grid), self._side, grid
        total = rows * columns
        if keep == total:
            return None
        pieces = _choose(total // side**2, keep // side**2, seed=seed, step=step, slots=slots)
        if side > 1:
            per_row = columns // side
            corner = pieces // per_row * side * columns + pieces % per_row * side
            pieces = (corner[:, :, None] + _window(side, columns, slots.device)).flatten(1)
        return pieces.sort(dim=1).values

    def _visible(self, grid: Grid, **draw) -> Tensor:
        if self.max_ratio is None:
            return super()._visible(grid, **draw)
        self.validate(grid)
        side, (rows, columns) = self._side, grid
        u = random.uniform(1, stream=Stream.MASK_RATIO, **draw)[:, 0].to(torch.float64)
        ratio = (self.ratio + (self.max_ratio - self.ratio) * u).clamp(max=self.max_ratio)
        masked = (ratio * (rows * columns)).long() // side**2
        num_pieces = rows * columns // side**2
        pieces = _smallest(num_pieces, num_pieces - masked, **draw)
        pieces = pieces.unflatten(1, (rows // side, 1, columns // side, 1))
        return pieces.expand(-1, -1, side, -1, side).flatten(1)


@dataclasses.dataclass(frozen=True)
class PatchMask(_RatioMask):
    """Independent patches: ``K = N - int(ratio * N)``.

    Args:
        ratio: share of masked patches, ``0 <= ratio < 1``.
        max_ratio: draw the ratio of each image uniformly between `ratio` and this; None: the same for all.

    Raises:
        ValueError: if a value is out of range.
    """

    ratio: float
    max_ratio: float | None = None

    _side = 1

    def validate(self, grid: Grid) -> None:
        """Raise ValueError unless the grid has a patch."""
        _check_grid(grid)


@dataclasses.dataclass(frozen=True)
class BlockMask(_RatioMask):
    """Aligned square blocks of b x b patches: ``K = N - b^2 * (int(ratio * N) // b^2)``.

    Args:
        ratio: share of masked patches, ``0 <= ratio < 1``.
        block_size: side b of a block in patches; must divide both sides of the grid.
        max_ratio: draw the ratio of each image uniformly between `ratio` and this; None: the same for all.

    Raises:
        ValueError, TypeError: if a value is out of range; if `block_size` is no int.
    """

    ratio: float
    block_size: int
    max_ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_int("BlockMask", "block_size", self.block_size)
        if self.block_size < 1:
            raise ValueError(f"BlockMask: block_size is {self.block_size}, want at least 1")

    @property
    def _side(self) -> int:
        return self.block_size

    def validate(self, grid: Grid) -> None:
        """Raise ValueError unless `block_size` divides both sides of `grid`."""
        _check_grid(grid)
        if grid[0] % self.block_size or grid[1] % self.block_size:
            raise ValueError(
                f"BlockMask: block_size {self.block_size} does not divide the grid of {grid[0]}x{grid[1]} patches; "
                "choose a common divisor of its sides"
            )


@dataclasses.dataclass(frozen=True)
class CropMask(_AnyMask):
    """One window of c x c patches, its corner uniform over all places: ``K = c^2``.

    Args:
        size: side c of the window in patches; at most the shorter side of the grid.

    Raises:
        ValueError, TypeError: if `size` is less than 1; if it is no int.
    """

    size: int

    def __post_init__(self):
        check_int("CropMask", "size", self.size)
        if self.size < 1:
            raise ValueError(f"CropMask: size is {self.size}, want at least 1")

    def validate(self, grid: Grid) -> None:
        """Raise ValueError unless the window fits into `grid`."""
        _check_grid(grid)
        if self.size > min(grid):
            raise ValueError(
                f"CropMask: a window of {self.size}x{self.size} patches does not fit into the grid of "
                f"{grid[0]}x{grid[1]}; want a size of at most {min(grid)}"
            )

    def num_visible(self, grid: Grid) -> int:
        """K."""
        self.validate(grid)
        return self.size**2

    def sample(self, grid: Grid, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """``ids_keep [B, K]`` of the images at `slots`; element 0 of a slot places the row, element 1 the column."""
        self.validate(grid)
        rows, columns = grid
        draws = random.uniform(2, seed=seed, stream=Stream.MASK, step=step, slots=slots).to(torch.float64)
        row, column = (draws[:, 0] * (rows - self.size + 1)).long(), (draws[:, 1] * (columns - self.size + 1)).long()
        return (row * columns + column)[:, None] + _window(self.size, columns, slots.device)


Mask: TypeAlias = NoMask | PatchMask | BlockMask | CropMask


def _keys(num: int, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
    """Word and index of `num` candidates in one key, int64 ``[B, num]``: all differ, and carry the index along."""
    words = random.bits(num, seed=seed, stream=Stream.MASK, step=step, slots=slots)
    return words * num + torch.arange(num, device=slots.device)


def _choose(num: int, keep: int, **draw) -> Tensor:
    """The indices of the `keep` smallest of `num` words per slot, ties by index; int64 ``[B, keep]`` in no order."""
    return _keys(num, **draw).topk(keep, dim=1, largest=False, sorted=False).values % num


def _smallest(num: int, keep: Tensor, **draw) -> Tensor:
    """bool ``[B, num]``, True for the ``keep[b] >= 1`` smallest of the words of slot b, ties by index."""
    keys = _keys(num, **draw)
    return keys <= keys.sort(dim=1).values.gather(1, keep[:, None] - 1)


def _window(side: int, columns: int, device: torch.device) -> Tensor:
    """Offsets of a square window from its corner, int64 ``[side * side]``, ascending."""
    offsets = torch.arange(side, device=device)
    return (offsets[:, None] * columns + offsets).flatten()


def _check_grid(grid: Grid) -> None:
    if not isinstance(grid, tuple | list):
        raise TypeError(f"mask: grid is of type {type(grid).__name__}, want (rows, columns) in patches")
    for side in grid:
        check_int("mask", "a side of the grid", side)
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"mask: grid is {grid}, want (rows, columns) in patches, each at least 1")
