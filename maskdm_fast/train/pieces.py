"""Tensors in pieces: what one process has of a training state, and how any other number of processes reads it.

A piece is a whole tensor, or a `Fragment`: a range of its values in row-major order. Files hold pieces, one file per
group of tensors and process; readers ask for whole tensors or for ranges, whatever the pieces were.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from maskdm_fast.train.extras import require

_FRAGMENTS = "fragments"


@dataclass(frozen=True)
class Fragment:
    """Values ``start .. start + n - 1`` of a flattened tensor.

    Attributes:
        values: ``[n]``.
        start: place of the first of them.
        shape: of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]


Pieces = Mapping[str, Mapping[str, Tensor | Fragment]]
"""What a process has of a state, by group and name."""


class Reader(Protocol):
    """Gives the tensors of a state, by group and name."""

    def names(self, group: str) -> Collection[str]:
        """Names of the tensors of a group; empty if there is no such group."""
        ...

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def fragment(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Values ``start .. stop - 1`` of the flattened tensor, ``[stop - start]`` on the CPU."""
        ...

    def tensor(self, group: str, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        ...


class Held:
    """Implements `Reader` on whole tensors in memory."""

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._groups = groups

    def names(self, group: str) -> Collection[str]:
        return self._groups.get(group, {}).keys()

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        return tuple(self._groups[group][name].shape)

    def fragment(self, group: str, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(group, name).reshape(-1)[start:stop]

    def tensor(self, group: str, name: str) -> Tensor:
        return self._groups[group][name]


class Renamed:
    """Implements `Reader` on those groups of another one whose names begin with `prefix`, without it.

    Args:
        reader: the other one.
        prefix: of the names.
    """

    def __init__(self, reader: Reader, prefix: str) -> None:
        self._reader, self._prefix = reader, prefix

    def names(self, group: str) -> Collection[str]:
        return self._reader.names(self._prefix + group)

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._prefix + group, name)

    def fragment(self, group: str, name: str, start: int, stop: int) -> Tensor:
        return self._reader.fragment(self._prefix + group, name, start, stop)

    def tensor(self, group: str, name: str) -> Tensor:
        return self._reader.tensor(self._prefix + group, name)


class Part:
    """Implements `Reader` on the tensors of one of several modules that share groups.

    Args:
        reader: of all tensors.
        prefix: begins the names of one module's tensors, and no others.
        rest: read all others, instead of those of the module without the prefix.
    """

    def __init__(self, reader: Reader, prefix: str, *, rest: bool = False) -> None:
        self._reader, self._prefix, self._rest = reader, prefix, rest

    def names(self, group: str) -> Collection[str]:
        prefix, names = self._prefix, self._reader.names(group)
        if self._rest:
            return [name for name in names if not name.startswith(prefix)]
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        return self._reader.shape(group, self._there(name))

    def fragment(self, group: str, name: str, start: int, stop: int) -> Tensor:
        return self._reader.fragment(group, self._there(name), start, stop)

    def tensor(self, group: str, name: str) -> Tensor:
        return self._reader.tensor(group, self._there(name))

    def _there(self, name: str) -> str:
        return name if self._rest else self._prefix + name


def share_out(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which process writes which of the tensors that all of them hold: the largest first, each to who has the least.

    Args:
        sizes: values of each tensor, by name.
        world_size: number of processes.

    Returns:
        Rank by name.
    """
    loads = [0] * world_size
    ranks = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        ranks[name] = loads.index(min(loads))
        loads[ranks[name]] += sizes[name]
    return ranks


def file_name(group: str, rank: int, world_size: int) -> str:
    """``GROUP.safetensors``, where there are several processes ``GROUP-00000-of-00002.safetensors``."""
    return f"{group}.safetensors" if world_size == 1 else f"{group}-{rank:05d}-of-{world_size:05d}.safetensors"


def group_of(name: str) -> str:
    """The group of a file that `file_name` named."""
    return re.sub(r"(-\d{5,}-of-\d{5,})?\.safetensors$", "", name)


def write_pieces(path: Path, pieces: Mapping[str, Tensor | Fragment]) -> None:
    """Write the pieces of one group to a safetensors file; fragments are listed in its metadata."""
    whole = {name: piece.values if isinstance(piece, Fragment) else piece for name, piece in pieces.items()}
    places = {name: [piece.start, *piece.shape] for name, piece in pieces.items() if isinstance(piece, Fragment)}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
    metadata = {_FRAGMENTS: json.dumps(places)} if places else None
    require("safetensors.torch").save_file(on_cpu, path, metadata)


@dataclass(frozen=True)
class _Piece:
    file: Any
    start: int
    count: int
    shape: tuple[int, ...]
    whole: bool

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Values of the flattened tensor that this piece holds, and as little else as the file allows."""
        if not self.whole:
            return self.file.get_slice(name)[start - self.start : stop - self.start]
        if not self.shape:
            return self.file.get_tensor(name).reshape(1)[start:stop]
        row = self.count // max(self.shape[0], 1) or 1
        first, last = start // row, -(-stop // row)
        rows = self.file.get_slice(name)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]


class FileReader:
    """Implements `Reader` on files of pieces, of any number of processes; reads what is asked for, not more.

    Args:
        files: safetensors files by group.
    """

    def __init__(self, files: Mapping[str, Iterable[Path]]) -> None:
        self._files = {group: sorted(paths) for group, paths in files.items()}
        self._index: dict[str, dict[str, list[_Piece]]] = {}

    def names(self, group: str) -> Collection[str]:
        return self._pieces(group).keys()

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        return self._pieces(group)[name][0].shape

    def fragment(self, group: str, name: str, start: int, stop: int) -> Tensor:
        pieces, parts, place = self._pieces(group)[name], [], start
        for piece in pieces:
            if piece.start <= place < min(stop, piece.start + piece.count):
                end = min(stop, piece.start + piece.count)
                parts.append(piece.read(name, place, end))
                place = end
        if place < stop:
            raise ValueError(f"values {place} to {stop - 1} of {group} {name} are in none of the files")
        if not parts:  # of no values, which have a dtype nevertheless
            return pieces[0].read(name, pieces[0].start, pieces[0].start)
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def tensor(self, group: str, name: str) -> Tensor:
        first = self._pieces(group)[name][0]
        if first.whole:
            return first.file.get_tensor(name)
        return self.fragment(group, name, 0, math.prod(first.shape)).reshape(first.shape)

    def _pieces(self, group: str) -> dict[str, list[_Piece]]:
        if group not in self._index:
            index: dict[str, list[_Piece]] = {}
            for path in self._files.get(group, []):
                file = require("safetensors").safe_open(path, framework="pt")
                places = json.loads((file.metadata() or {}).get(_FRAGMENTS, "{}"))
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    held = tuple(file.get_slice(name).get_shape())
                    start, *shape = places.get(name, (0, *held))
                    piece = _Piece(file, start, math.prod(held), tuple(shape), name not in places)
                    index.setdefault(name, []).append(piece)
            for pieces in index.values():
                pieces.sort(key=lambda piece: piece.start)
            self._index[group] = index
        return self._index[group]


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_whole(path: Path, reader: Reader, group: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write the tensors of one group, whole, to one safetensors file, holding one of them at a time.

    The package safetensors writes only what is in memory all at once; its format is eight bytes with the length of a
    header, the header in JSON with the place of every tensor, and their values in that order.

    Args:
        path: the file.
        reader: gives the tensors.
        group: which.
        dtype: of the tensors in the file: float32, bfloat16 or float16.
        metadata: for the header; it stands first in the file.

    Raises:
        ValueError: `dtype` is another.
    """
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype is {dtype}, want one of {', '.join(map(str, _DTYPE_NAMES))}")
    names, place = sorted(reader.names(group)), 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name in names:
        shape = reader.shape(group, name)
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = reader.tensor(group, name).to(dtype).contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
