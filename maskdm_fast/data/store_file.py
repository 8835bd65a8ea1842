"""Files of packed images: one store, or the small index of several. `ImageStore.open` reads both.

Layout of a store, little-endian:

    0      magic, version, offset and size of the header, SHA-256 of the header (zeros up to byte 4096)
    4096   images, uint8 [n, h, w, C], or float16 where they are latents
    ...    labels, int64 [n]
    ...    header, JSON

The header stands last because it holds what is known last: the checksum of the data and the files that were skipped.
An index is another magic and the same header, with the names of its stores, relative to itself.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

VERSION = 1
LATENTS_VERSION = 2
DATA_OFFSET = 4096
CHUNK_BYTES = 1 << 24
_MAGIC = b"maskdm\x00\xf5"
_INDEX_MAGIC = b"maskdm\x00\xf6"
_PREFIX = struct.Struct("<8sIIQQ32s")
_STALE_SECONDS = 24 * 3600

Progress = Callable[[int, int], None]  # called with (done, total)


class StoreError(RuntimeError):
    """A file is not a store that this version can read."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
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


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever holds it; it ends with the process, however that ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class LatentScaling(NamedTuple):
    """How the latents z of an autoencoder become the x0 that a network is trained on, and back.

        x0 = (z - shift) * scale

    Attributes:
        scale: such that x0 has a standard deviation of about 1; 0.18215 for the autoencoder of Stable Diffusion 1, 2.
        shift: mean of the latents.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752,
    appendix G; names of diffusers' AutoencoderKL (scaling_factor, shift_factor).
    """

    scale: float
    shift: float = 0.0

    def check(self) -> "LatentScaling":
        """These values, or ValueError where they cannot be undone."""
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of latents is {self.scale}, want a number more than 0")
        if not math.isfinite(self.shift):
            raise ValueError(f"the shift of latents is {self.shift}, want a number")
        return self


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What a store says about itself.

    Attributes:
        shape: ``[n, h, w, C]``.
        class_names: one per class, empty where labels are -1.
        source: name of the source.
        fingerprint: key of the source and of how it was packed.
        checksum: SHA-256 of images and labels, hex; the same in one file or several.
        skipped: pairs (file, reason) that were left out.
        attribution: credit the artwork demands, or "".
        latents: None for uint8 images; of latents, which are kept as float16 x0, how they were scaled.
        bound: largest absolute value of x0; 1 for images.
    """

    shape: tuple[int, int, int, int]
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    checksum: str
    skipped: tuple[tuple[str, str], ...]
    attribution: str
    latents: LatentScaling | None = None
    bound: float = 1.0

    @property
    def dtype(self) -> np.dtype:
        """Of the images in the file."""
        return np.dtype(np.uint8 if self.latents is None else "<f2")

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """JSON values; those of images are what version 1 has always written."""
        fields = dataclasses.asdict(self)
        if self.latents is None:
            del fields["latents"], fields["bound"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StoreHeader":
        """The header that `to_json` gave."""
        latents = fields.get("latents")
        return cls(
            **fields
            | {
                "shape": tuple(fields["shape"]),
                "class_names": tuple(fields["class_names"]),
                "skipped": tuple((name, reason) for name, reason in fields["skipped"]),
                "latents": None if latents is None else LatentScaling(*latents),
            }
        )


class Part(NamedTuple):
    """A store that an index names.

    Attributes:
        file: POSIX path relative to the folder of the index.
        num_images: that it holds.
        checksum: of its own header.
    """

    file: str
    num_images: int
    checksum: str


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
    latents: LatentScaling | None = None,
) -> None:
    """Write images to a store, in one pass and with bounded memory.

    Args:
        path: the file to make; its folder must exist. It appears under this name only when it is complete.
        images: pairs (uint8 ``[image_size, image_size, channels]``, or float16 where there is `latents`, label).
        image_size: side in pixels.
        skipped: (file, reason) of files left out; read after `images` is exhausted, so an iterator may append to it.
        latents: the images are x0 of latents that were scaled so.

    Raises:
        ValueError: an image has another shape or dtype, or there are none.
    """
    shape, labels, checksum, bound = (image_size, image_size, channels), [], hashlib.sha256(), 0.0
    dtype = np.dtype(np.uint8 if latents is None else np.float16)
    with atomic_file(Path(path)) as file:
        file.seek(DATA_OFFSET)
        for image, label in images:
            if image.shape != shape or image.dtype != dtype:
                raise ValueError(f"image {len(labels)} is {image.dtype} {image.shape}, want {dtype} {shape}")
            data = image.astype(image.dtype.newbyteorder("<"), copy=False).tobytes()
            checksum.update(data)
            file.write(data)
            labels.append(label)
            if latents is not None:
                bound = max(bound, float(np.abs(image).max()))
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
            latents=latents,
            bound=1.0 if latents is None else bound,
        )
        text = json.dumps(header.to_json()).encode()
        offset = file.tell()
        file.write(text)
        file.seek(0)
        version = VERSION if latents is None else LATENTS_VERSION
        file.write(_PREFIX.pack(_MAGIC, version, 0, offset, len(text), hashlib.sha256(text).digest()))


def write_index(path: Path, header: StoreHeader, parts: list[Part]) -> None:
    """Write the index of stores that are there already; it appears whole or not at all.

    Args:
        path: the file to make.
        header: of all the images, in the order of `parts`.
        parts: the stores.
    """
    text = json.dumps({"header": header.to_json(), "parts": parts}).encode()
    with atomic_file(path) as file:
        digest = hashlib.sha256(text).digest()
        file.write(_PREFIX.pack(_INDEX_MAGIC, VERSION, 0, _PREFIX.size, len(text), digest))
        file.write(text)


def read_header(path: Path) -> tuple[StoreHeader, list[Part] | None]:
    """The header of a store and None, or of an index and the stores it names.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is foreign, truncated, damaged in its header, or of another version.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or prefix[: len(_MAGIC)] not in (_MAGIC, _INDEX_MAGIC):
            raise StoreError(f"{str(path)!r} is not an image store of maskdm_fast")
        magic, version, _, offset, length, digest = _PREFIX.unpack(prefix)
        known = (VERSION, LATENTS_VERSION) if magic == _MAGIC else (VERSION,)
        if version not in known:
            want = " or ".join(map(str, known))
            raise StoreError(f"{str(path)!r} is a store of version {version}, want {want}: delete it and pack again")
        if size != offset + length:
            raise StoreError(f"{str(path)!r} has {size} bytes, want {offset + length}: delete it and pack again")
        file.seek(offset)
        text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise StoreError(f"the header of {str(path)!r} is damaged: delete the file and pack again")
    fields = json.loads(text)
    if magic == _INDEX_MAGIC:
        return StoreHeader.from_json(fields["header"]), [Part(*part) for part in fields["parts"]]
    header = StoreHeader.from_json(fields)
    if offset != DATA_OFFSET + header.nbytes + header.shape[0] * 8:
        raise StoreError(f"the header of {str(path)!r} does not fit its size: delete the file and pack again")
    return header, None
