"""Packed images that are memory-mapped instead of decoded, in one file or several."""

import hashlib
import mmap
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

READ_AHEAD_BYTES = 4 << 30
"""Images of more bytes than this may not lie in memory: what a batch needs is asked for at once."""


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
        files: the stores that hold the data, mapped into memory; none where there are no such files.

    Attributes:
        path: the file.
        header: `StoreHeader`.
        images: ``[n, h, w, C]``, uint8, or float16 x0 where they are latents: a read-only array over the mapped file,
            or of several files `ImageRows`, which are indexed alike.
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
        files: Sequence["_MappedFile"] = (),
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
        held = [(path, header)] if parts is None else [_open_part(path, header, part) for part in parts]
        files = [_MappedFile(*one) for one in held]
        images = files[0].images if parts is None else JoinedImages([file.images for file in files])
        labels = np.concatenate([file.labels() for file in files]).astype(np.int64, copy=False)
        return cls(path, header, images, labels, files)

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
        if self.nbytes > READ_AHEAD_BYTES:
            self._read_ahead(indices.numpy())
        return torch.from_numpy(np.asarray(self.images[indices.numpy()])), self.labels[indices]

    def _read_ahead(self, indices: np.ndarray) -> None:
        first = 0
        for file in self._files:
            count = len(file.images)
            file.read_ahead(indices[(first <= indices) & (indices < first + count)] - first)
            first += count

    def verify(self) -> None:
        """Read everything and compare the checksum.

        Raises:
            StoreError: a byte of images or labels has changed since packing.
        """
        for file in self._files:
            file.verify()


class _MappedFile:
    """One store file; `images` is a read-only array over it."""

    def __init__(self, path: Path, header: StoreHeader) -> None:
        self._path, self._header = path, header
        with open(path, "rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.images = np.ndarray(header.shape, header.dtype, self._mapping, DATA_OFFSET)

    def labels(self) -> np.ndarray:
        """int64 ``[n]``, copied."""
        return np.frombuffer(self._mapping, "<i8", len(self.images), DATA_OFFSET + self._header.nbytes).copy()

    def read_ahead(self, indices: np.ndarray) -> None:
        """Let the system read these images all at once; copied without that, they come one page fault after the other.

        From a disk, 256 images of 64 px took 128 to 225 ms without and 5 to 10 ms with it, of 256 px 186 to 232 and 55
        to 58 ms; from memory 0.2 ms and 0.4 ms, 12 and 27 ms (medians of 8, one core of an EPYC, others running).
        """
        size = self._header.nbytes // len(self.images)
        for start in (DATA_OFFSET + indices * size).tolist():
            page = start - start % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def verify(self) -> None:
        """Raise StoreError if a byte of images or labels is not as it was written."""
        checksum = hashlib.sha256()
        remaining = self._header.nbytes + 8 * len(self.images)
        with open(self._path, "rb") as file:
            file.seek(DATA_OFFSET)
            while remaining and (data := file.read(min(CHUNK_BYTES, remaining))):
                checksum.update(data)
                remaining -= len(data)
        if checksum.hexdigest() != self._header.checksum:
            raise StoreError(f"the data of {str(self._path)!r} is damaged: delete the file and pack again")


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
