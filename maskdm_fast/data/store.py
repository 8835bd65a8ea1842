"""A file of uint8 images that is memory-mapped instead of decoded.

Layout, little-endian:

    0      magic, version, offset and size of the header, SHA-256 of the header (zeros up to byte 4096)
    4096   images, uint8 [n, h, w, C]
    ...    labels, int64 [n]
    ...    header, JSON

The header stands last because it holds what is known last: the checksum of the data and the files that were skipped.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

VERSION = 1
_MAGIC = b"maskdm\x00\xf5"
_PREFIX = struct.Struct("<8sIIQQ32s")
_DATA_OFFSET = 4096
_CHUNK_BYTES = 1 << 24
_STALE_SECONDS = 24 * 3600

Progress = Callable[[int, int], None]  # called with (done, total)


class StoreError(RuntimeError):
    """A file is not a store that this version can read."""


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under `path` whole, or not at all, also when the machine stops.

    Every writer has a temporary name of its own, so writers at the same time cannot mix; the last one to finish wins.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        # A killed writer cannot clean up. A living one keeps its file's time fresh.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What a store says about itself.

    Attributes:
        shape: ``[n, h, w, C]``.
        class_names: one per class, empty where labels are -1.
        source: name of the source.
        fingerprint: key of the source and of how it was packed.
        checksum: SHA-256 of images and labels, hex.
        skipped: pairs (file, reason) that were left out.
        attribution: credit the artwork demands, or "".
    """

    shape: tuple[int, int, int, int]
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    checksum: str
    skipped: tuple[tuple[str, str], ...]
    attribution: str

    @classmethod
    def from_json(cls, text: bytes) -> "StoreHeader":
        """The header that `write_store` wrote as JSON."""
        fields = json.loads(text)
        return cls(
            **fields
            | {
                "shape": tuple(fields["shape"]),
                "class_names": tuple(fields["class_names"]),
                "skipped": tuple((name, reason) for name, reason in fields["skipped"]),
            }
        )


def write_store(
    path: str | os.PathLike[str],
    images: Iterable[tuple[np.ndarray, int]],
    *,
    image_size: int,
    channels: int = 3,
    class_names: tuple[str, ...] = (),
    source: str = "",
    fingerprint: str = "",
    skipped: list[tuple[str, str]] | None = None,
    attribution: str = "",
) -> None:
    """Write images to a store, in one pass and with bounded memory.

    Args:
        path: the file to make; its folder must exist. It appears under this name only when it is complete.
        images: pairs (uint8 ``[image_size, image_size, channels]``, label).
        image_size: side in pixels.
        skipped: (file, reason) of files left out; read after `images` is exhausted, so an iterator may append to it.

    Raises:
        ValueError: an image has another shape or dtype, or there are none.
    """
    shape, labels, checksum = (image_size, image_size, channels), [], hashlib.sha256()
    with _atomic_file(Path(path)) as file:
        file.seek(_DATA_OFFSET)
        for image, label in images:
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"image {len(labels)} is {image.dtype} {image.shape}, want uint8 {shape}")
            data = image.tobytes()
            checksum.update(data)
            file.write(data)
            labels.append(label)
        if not labels:
            raise ValueError("there are no images to store")
        data = np.asarray(labels, dtype="<i8").tobytes()
        checksum.update(data)
        file.write(data)
        header = StoreHeader(
            shape=(len(labels), *shape),
            class_names=class_names,
            source=source,
            fingerprint=fingerprint,
            checksum=checksum.hexdigest(),
            skipped=tuple(skipped or ()),
            attribution=attribution,
        )
        text = json.dumps(dataclasses.asdict(header)).encode()
        offset = file.tell()
        file.write(text)
        file.seek(0)
        file.write(_PREFIX.pack(_MAGIC, VERSION, 0, offset, len(text), hashlib.sha256(text).digest()))


def _read_header(path: Path) -> StoreHeader:
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or prefix[: len(_MAGIC)] != _MAGIC:
            raise StoreError(f"{str(path)!r} is not an image store of maskdm_fast")
        _, version, _, offset, length, digest = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise StoreError(f"{str(path)!r} is a store of version {version}, want {VERSION}: delete it and pack again")
        if size != offset + length:
            raise StoreError(f"{str(path)!r} has {size} bytes, want {offset + length}: delete it and pack again")
        file.seek(offset)
        text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise StoreError(f"the header of {str(path)!r} is damaged: delete the file and pack again")
    header = StoreHeader.from_json(text)
    num_images, height, width, channels = header.shape
    if offset != _DATA_OFFSET + num_images * height * width * channels + num_images * 8:
        raise StoreError(f"the header of {str(path)!r} does not fit its size: delete the file and pack again")
    return header


class ImageStore:
    """Memory-mapped images and their labels; open one with `ImageStore.open`.

    Attributes:
        path: the file.
        header: `StoreHeader`.
        images: read-only uint8 memmap ``[n, h, w, C]``.
        labels: int64 tensor ``[n]``; class index, or -1 for all where there are no classes.
    """

    def __init__(self, path: Path, header: StoreHeader) -> None:
        self.path = path
        self.header = header
        self.images = np.memmap(path, np.uint8, "r", _DATA_OFFSET, header.shape)
        labels = np.fromfile(path, "<i8", len(self), offset=_DATA_OFFSET + self.images.size)
        self.labels = torch.from_numpy(labels.astype(np.int64, copy=False))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ImageStore":
        """Open a store after checking magic, version, the header's own checksum and the size of the file.

        The images are not read; `verify` does that.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the file is foreign, truncated, damaged in its header, or of another version.
        """
        path = Path(path)
        return cls(path, _read_header(path))

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

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copy images out of the store.

        Args:
            indices: int64 ``[B]`` with values in ``[0, n)``, on the CPU.

        Returns:
            Images, uint8 ``[B, h, w, C]``, and labels, int64 ``[B]``.

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
        checksum = hashlib.sha256()
        remaining = self.images.size + 8 * len(self)
        with open(self.path, "rb") as file:
            file.seek(_DATA_OFFSET)
            while remaining and (data := file.read(min(_CHUNK_BYTES, remaining))):
                checksum.update(data)
                remaining -= len(data)
        if checksum.hexdigest() != self.header.checksum:
            raise StoreError(f"the data of {str(self.path)!r} is damaged: delete the file and pack again")
