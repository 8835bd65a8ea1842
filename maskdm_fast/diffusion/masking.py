"""Which patches of an image are visible.

Every mask keeps the same number of patches in each image of a run, so a batch has static shapes. Masks round the number
of masked patches down, blocks to whole blocks: compare runs by `num_visible`, not by their nominal ratio.

A grid is (rows, columns) in patches; token n lies at row ``n // columns``, column ``n % columns``. ``sample`` returns
int64 ``ids_keep [B, K]``, ascending, on the device of `slots`, drawn from `Stream.MASK`: each candidate gets one 32-bit
word and those with the smallest words are visible, ties by index.

Source: Lei et al., "Masked Diffusion Models Are Fast Distribution Learners", arXiv 2306.11363.
"""

import dataclasses
from typing import TypeAlias

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.random import Stream

Grid: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class NoMask:
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


@dataclasses.dataclass(frozen=True)
class PatchMask:
    """Independent patches: ``K = N - int(ratio * N)``.

    Args:
        ratio: share of masked patches, ``0 <= ratio < 1``.

    Raises:
        ValueError: if `ratio` is out of range.
    """

    ratio: float

    def __post_init__(self):
        _check_ratio(self)

    def validate(self, grid: Grid) -> None:
        """Raise ValueError unless the grid has a patch."""
        _check_grid(grid)

    def num_visible(self, grid: Grid) -> int:
        """K, at least 1."""
        self.validate(grid)
        total = grid[0] * grid[1]
        return total - int(self.ratio * total)

    def sample(self, grid: Grid, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """``ids_keep [B, K]`` of the images at `slots`."""
        keep = self.num_visible(grid)
        return _choose(grid[0] * grid[1], keep, seed=seed, step=step, slots=slots).sort(dim=1).values


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Aligned square blocks of b x b patches: ``K = N - b^2 * (int(ratio * N) // b^2)``.

    Args:
        ratio: share of masked patches, ``0 <= ratio < 1``.
        block_size: side b of a block in patches; must divide both sides of the grid.

    Raises:
        ValueError: if a value is out of range.
    """

    ratio: float
    block_size: int

    def __post_init__(self):
        _check_ratio(self)
        if self.block_size < 1:
            raise ValueError(f"BlockMask: block_size is {self.block_size}, want at least 1")

    def validate(self, grid: Grid) -> None:
        """Raise ValueError unless `block_size` divides both sides of `grid`."""
        _check_grid(grid)
        if grid[0] % self.block_size or grid[1] % self.block_size:
            raise ValueError(
                f"BlockMask: block_size {self.block_size} does not divide the grid of {grid[0]}x{grid[1]} patches; "
                "choose a common divisor of its sides"
            )

    def num_visible(self, grid: Grid) -> int:
        """K, at least one block."""
        self.validate(grid)
        total, area = grid[0] * grid[1], self.block_size**2
        return total - int(self.ratio * total) // area * area

    def sample(self, grid: Grid, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
        """``ids_keep [B, K]`` of the images at `slots`."""
        side, (rows, columns) = self.block_size, grid
        keep = self.num_visible(grid) // side**2
        blocks_per_row = columns // side
        blocks = _choose(rows // side * blocks_per_row, keep, seed=seed, step=step, slots=slots)  # [B, keep]
        corner = blocks // blocks_per_row * side * columns + blocks % blocks_per_row * side
        return (corner[:, :, None] + _window(side, columns, slots.device)).flatten(1).sort(dim=1).values


@dataclasses.dataclass(frozen=True)
class CropMask:
    """One window of c x c patches, its corner uniform over all places: ``K = c^2``.

    Args:
        size: side c of the window in patches; at most the shorter side of the grid.

    Raises:
        ValueError: if `size` is less than 1.
    """

    size: int

    def __post_init__(self):
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


def _choose(num: int, keep: int, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor:
    """The indices of the `keep` smallest of `num` words per slot, ties by index; int64 ``[B, keep]`` in no order."""
    words = random.bits(num, seed=seed, stream=Stream.MASK, step=step, slots=slots)
    # Word and index in one key: all keys differ, so a partial selection is exact and carries the index along.
    keys = words * num + torch.arange(num, device=slots.device)
    return keys.topk(keep, dim=1, largest=False, sorted=False).values % num


def _window(side: int, columns: int, device: torch.device) -> Tensor:
    """Offsets of a square window from its corner, int64 ``[side * side]``, ascending."""
    offsets = torch.arange(side, device=device)
    return (offsets[:, None] * columns + offsets).flatten()


def _check_grid(grid: Grid) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"mask: grid is {grid}, want (rows, columns) in patches, each at least 1")


def _check_ratio(mask: PatchMask | BlockMask) -> None:
    if not 0.0 <= mask.ratio < 1.0:
        raise ValueError(
            f"{type(mask).__name__}: ratio is {mask.ratio}, want 0 <= ratio < 1 (the share of masked patches)"
        )
