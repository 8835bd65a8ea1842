"""Packed images that are memory-mapped instead of decoded, in one file or several."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskdm_fast.data.store_file import (
    CHUNK_BYTES,
    DATA_OFFSET,
    LatentScaling,
    Part,
    StoreError,
    StoreHeader,
    read_header,
)


class ImageRows(ABC):
    """Images that are no single array, but are taken out as from one: ``images[3]``, ``images[2:9]``, ``images[ids]``.

    Attributes:
        shape: ``(n, h, w, C)``.
        dtype: numpy dtype of the images.
    """

    ndim = 4

    def __init__(self, shape: tuple[int, int, int, int], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @abstractmethod
    def _take(self, indices: np.ndarray) -> np.ndarray:
        """A new array of the images at `indices`, int64 ``[B]`` in ``[0, n)``."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(key, slice):
            return self._take(np.arange(*key.indices(len(self))))
        wanted = np.asarray(key)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        # An empty list becomes an array of floats.
        wanted = wanted.astype(np.int64, casting="same_kind" if wanted.size else "unsafe")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"index {key} is out of range for {len(self)} images")
        return self._take(wanted.reshape(-1)).reshape(*wanted.shape, *self.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


class JoinedImages(ImageRows):
    """Arrays of images laid end to end.

    Args:
        parts: arrays ``[n_i, h, w, C]`` of one dtype.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        super().__init__((int(self._starts[-1]), *parts[0].shape[1:]), parts[0].dtype)

    def _take(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(part_of):
            places = np.flatnonzero(part_of == number)
            out[places] = self._parts[number][indices[places] - self._starts[number]]
        return out


class ImageStore:
    """Images and their labels; open one with `ImageStore.open`.

    Args:
        path: the file, for messages.
        header: what it says.
        images: see below.
        labels: see below.
        files: the stores that hold the data.

    Attributes:
        path: the file.
        header: `StoreHeader`.
        images: ``[n, h, w, C]``, uint8, or float16 x0 where they are latents: a read-only memmap, or of several files
            `ImageRows`, which are indexed alike.
        labels: int64 tensor ``[n]``; class index, or -1 for all where there are no classes.
        is_mapped: whether the images lie on the disk as they are; else each one is decoded when it is asked for.
    """

    is_mapped = True

    def __init__(
        self,
        path: Path,
        header: StoreHeader,
        images: np.ndarray | ImageRows,
        labels: np.ndarray,
        files: Sequence[tuple[Path, StoreHeader]] = (),
    ) -> None:
        self.path, self.header, self.images = path, header, images
        self.labels = torch.from_numpy(labels)
        self._files = files

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ImageStore":
        """Open a store after checking magic, version, the header's own checksum and the size of the file; of an index
        also the same of every file it names, and that they are the ones it was made with.

        The images are not read; `verify` does that.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the file, or one that it names, is foreign, missing, truncated, damaged in its header, or of
                another version.
        """
        path = Path(path)
        header, parts = read_header(path)
        files = [(path, header)] if parts is None else [_open_part(path, header, part) for part in parts]
        arrays = [np.memmap(file, held.dtype, "r", DATA_OFFSET, held.shape) for file, held in files]
        labels = [np.fromfile(file, "<i8", held.shape[0], offset=DATA_OFFSET + held.nbytes) for file, held in files]
        images = arrays[0] if parts is None else JoinedImages(arrays)
        return cls(path, header, images, np.concatenate(labels).astype(np.int64, copy=False), files)

    def __len__(self) -> int:
        return self.header.shape[0]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.header.shape[1]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.header.shape[3]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels; empty where there are none."""
        return list(self.header.class_names)

    @property
    def latents(self) -> LatentScaling | None:
        """How the latents were scaled; None where they are images."""
        return self.header.latents

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return self.header.nbytes

    @property
    def num_files(self) -> int:
        """Files that the data lie in."""
        return len(self._files)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copy images out of the store. Several threads may call it at once.

        Args:
            indices: int64 ``[B]`` with values in ``[0, n)``, on the CPU.

        Returns:
            Images, uint8 ``[B, h, w, C]`` or float16 x0 of latents, and labels, int64 ``[B]``.

        Raises:
            IndexError: an index is out of range.
        """
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"indices span {int(indices.min())}..{int(indices.max())}, want 0..{len(self) - 1} ({str(self.path)!r})"
            )
        return torch.from_numpy(np.asarray(self.images[indices.numpy()])), self.labels[indices]

    def verify(self) -> None:
        """Read everything and compare the checksum.

        Raises:
            StoreError: a byte of images or labels has changed since packing.
        """
        for path, header in self._files:
            checksum = hashlib.sha256()
            remaining = header.nbytes + 8 * header.shape[0]
            with open(path, "rb") as file:
                file.seek(DATA_OFFSET)
                while remaining and (data := file.read(min(CHUNK_BYTES, remaining))):
                    checksum.update(data)
                    remaining -= len(data)
            if checksum.hexdigest() != header.checksum:
                raise StoreError(f"the data of {str(path)!r} is damaged: delete the file and pack again")


def _open_part(index: Path, whole: StoreHeader, part: Part) -> tuple[Path, StoreHeader]:
    path = index.parent / part.file
    try:
        header, parts = read_header(path)
    except FileNotFoundError as error:
        raise StoreError(
            f"{str(path)!r} is missing, which {str(index)!r} names: move both together, or pack again"
        ) from error
    held = (header.checksum, header.shape, header.latents)
    if parts is not None or held != (part.checksum, (part.num_images, *whole.shape[1:]), whole.latents):
        raise StoreError(f"{str(path)!r} is another file than {str(index)!r} was made with: pack again")
    return path, header
