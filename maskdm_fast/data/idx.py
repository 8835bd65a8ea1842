"""MNIST-style idx files: grey images and their labels as two binary files, plain or gzipped."""

import dataclasses
import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from maskdm_fast.data.labels import classes_of_values
from maskdm_fast.data.sources import digest, resize

_IMAGES_NAME = re.compile(r"(?P<set>.*)images[-.]idx3-ubyte(?P<gz>\.gz)?")
_UNSIGNED_BYTE = 0x08
_MNIST_SIDE, _PADDED_SIDE = 28, 32
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class IdxSource:
    """Grey images in one idx file, and their labels in another.

    Attributes:
        name: short name for messages and file names.
        path: the file of images.
        labels: class index of each image, or -1 for all where there is no file of labels.
        class_names: the values in the file of labels, as text of equal width, in numeric order; empty without one.
        fingerprint: hex digest that changes when a file is rewritten.
        attribution: always "": the files do not say whose images they hold.
        channels: of the packed images, unless others are asked for.
    """

    name: str
    path: Path
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    fingerprint: str
    attribution: str = ""
    channels: int = 1


def is_idx(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an idx file of images by its name, or a folder with such files at its top."""
    path = Path(path)
    return bool(_sets(path)) if path.is_dir() else path.is_file() and bool(_IMAGES_NAME.fullmatch(path.name))


def idx_source(path: str | os.PathLike[str]) -> IdxSource:
    """The images of an idx file, or of a folder that holds one.

    Files are named as those of MNIST: ``train-images-idx3-ubyte``, with the labels in ``train-labels-idx1-ubyte``
    beside it; a dot may stand before ``idx``, and either file may end in ``.gz``. Of a folder with several sets the one
    named ``train`` is taken; give the file itself for another one, such as ``t10k-images-idx3-ubyte.gz``.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without such a file, or with several and none of them ``train``; no idx file of bytes; or
            another number of labels than images.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {str(path)!r}")
    if path.is_dir():
        path = _pick(path)
    match = _IMAGES_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{str(path)!r} is not named like a file of images: want train-images-idx3-ubyte, or with .gz")
    with _open(path) as file:
        total = _read_shape(file, path, 3)[0]
    labels_path = _labels_path(path, match["set"])
    labels, class_names = (-1,) * total, ()
    if labels_path is not None:
        values = _read_labels(labels_path)
        if len(values) != total:
            raise ValueError(f"{str(path)!r} holds {total} images, but {str(labels_path)!r} {len(values)} labels")
        indices, class_names = classes_of_values(values)
        labels = tuple(indices.tolist())
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in (path, labels_path) if file is not None
    ]
    folder = path.resolve().parent.name or "idx"
    return IdxSource(f"{folder}-{match['set'].rstrip('-._') or 'images'}", path, labels, class_names, digest(stats))


def read_images(
    source: IdxSource, image_size: int, channels: int, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Read the images from `start` to before `stop` (None: all) one after the other, in the order of the file.

    Images of 28x28 pixels get a black border of 2 pixels where `image_size` is 32, which keeps every pixel; otherwise
    they are centre-cropped to a square and resized with Lanczos filtering where they have another size.

    Yields:
        uint8 ``[image_size, image_size, channels]``; with 3 channels the grey value stands three times.

    Raises:
        ValueError: the file is shorter or longer than its header says, or damaged.
    """
    with _open(source.path) as file:
        total, height, width = _read_shape(file, source.path, 3)
        border = (_PADDED_SIDE - _MNIST_SIDE) // 2
        padded = (height, width, image_size) == (_MNIST_SIDE, _MNIST_SIDE, _PADDED_SIDE)
        stop = total if stop is None else stop
        file.seek(start * height * width, os.SEEK_CUR)
        for begin in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - begin)
            data = _read(file, count * height * width, source.path)
            for image in np.frombuffer(data, np.uint8).reshape(count, height, width):
                image = np.pad(image, border) if padded else resize(image, image_size)
                yield np.repeat(image[..., None], channels, axis=2)
        if stop == total:
            _expect_end(file, source.path)


def _sets(folder: Path) -> dict[str, Path]:
    """Files of images at the top of `folder` by the name of their set; the plain one where it lies there twice."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _IMAGES_NAME.fullmatch(path.name)
        if match and not path.name.startswith(".") and not path.is_dir():
            found.setdefault(match["set"], path)
    return found


def _pick(folder: Path) -> Path:
    sets = _sets(folder)
    if not sets:
        raise ValueError(f"no file of images in {str(folder)!r}: want train-images-idx3-ubyte, or with .gz")
    if len(sets) == 1:
        return next(iter(sets.values()))
    for name, path in sets.items():
        if name.rstrip("-._") == "train":
            return path
    raise ValueError(
        f"{str(folder)!r} holds several sets ({', '.join(path.name for path in sets.values())}): give one file"
    )


def _labels_path(images: Path, name: str) -> Path | None:
    candidates = (images.with_name(f"{name}labels{mark}idx1-ubyte{end}") for mark in "-." for end in ("", ".gz"))
    # A link to nothing counts: labels that are missed are told, and not left out.
    return next((path for path in candidates if os.path.lexists(path)), None)


def _read_labels(path: Path) -> np.ndarray:
    with _open(path) as file:
        (total,) = _read_shape(file, path, 1)
        values = np.frombuffer(_read(file, total, path), np.uint8)
        _expect_end(file, path)
    return values


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else open(path, "rb")


def _read_shape(file: IO[bytes], path: Path, num_dims: int) -> tuple[int, ...]:
    """The sizes in the header: two zero bytes, the type, the number of dimensions, and each as a big-endian uint32."""
    zeros, kind, dims = struct.unpack(">HBB", _read(file, 4, path))
    if (zeros, kind, dims) != (0, _UNSIGNED_BYTE, num_dims):
        raise ValueError(f"{str(path)!r} is no idx file of unsigned bytes in {num_dims} dimension(s)")
    shape = struct.unpack(f">{dims}I", _read(file, 4 * dims, path))
    if math.prod(shape) == 0:
        raise ValueError(f"{str(path)!r} is empty: its header says {'x'.join(map(str, shape))}")
    return shape


def _read(file: IO[bytes], count: int, path: Path) -> bytes:
    try:
        data = file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; fetch it again") from error
    if len(data) != count:
        raise ValueError(f"{str(path)!r} is shorter than its header says; fetch it again")
    return data


def _expect_end(file: IO[bytes], path: Path) -> None:
    try:
        more = file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; fetch it again") from error
    if more:
        raise ValueError(f"{str(path)!r} is longer than its header says; fetch it again")
