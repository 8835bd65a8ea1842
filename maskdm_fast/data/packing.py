"""From a source to a packed store, in one file or, where it is large, in several under one index."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maskdm_fast.data.decoding import decode_range
from maskdm_fast.data.idx import IdxSource, read_images
from maskdm_fast.data.latents import LatentSource, read_latents
from maskdm_fast.data.sources import ImageSource, UnreadableImagesError
from maskdm_fast.data.store import ImageStore
from maskdm_fast.data.store_file import (
    CHUNK_BYTES,
    Part,
    Progress,
    StoreError,
    StoreHeader,
    waiting_lock,
    write_index,
    write_store,
)
from maskdm_fast.data.tars import TarSource

Source = ImageSource | IdxSource | TarSource | LatentSource

SHARD_BYTES = 16 << 30
"""Images of more bytes than this are packed into several files, unless it is said otherwise."""

_log = logging.getLogger(__name__)
_PACKING = 1  # goes into the packing key: raise it whenever the same files would decode to other bytes
_TOLD = 512
_PART = re.compile(r"[0-9a-f]{12}-\d{10}-\d{10}\.store")
_PART_TEMPORARY = re.compile(rf"\.{_PART.pattern}\.\d+-[0-9a-f]{{8}}\.tmp")


class _LeftOut(Exception):
    """A part of the images that is not written, because some cannot be read and must be, or none can."""


def packing_key(source: Source, image_size: int, channels: int) -> str:
    """Hex digest of what decides the images of a store."""
    converted = [channels] if channels != source.channels else []
    return hashlib.sha256(json.dumps([source.fingerprint, image_size, _PACKING, *converted]).encode()).hexdigest()


def check_shape(source: Source, image_size: int, channels: int) -> None:
    """Raise ValueError if the images of `source` cannot be had in this shape."""
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}, want at least 1")
    if isinstance(source, LatentSource):
        if (image_size, channels) != (source.image_size, source.channels):
            raise ValueError(
                f"image_size is {image_size} and channels is {channels}, but the latents of {source.name!r} are "
                f"{'x'.join(map(str, source.shape))} (C, h, w), which cannot be resized: want image_size "
                f"{source.image_size} and channels {source.channels}"
            )
    elif channels not in (1, 3):
        raise ValueError(f"channels is {channels}, want 1 (grey) or 3 (RGB)")


def pack(
    source: Source,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    channels: int | None = None,
    skip_bad: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> ImageStore:
    """Decode every image of a source into a store at `path`, and open it.

    Where the images have more than `shard_bytes`, they are packed into several stores in the folder ``NAME.shards``
    beside the index ``NAME.store``; a packing that was broken off goes on after the last whole one of them. The images,
    their order and the checksum are the same. Processes that pack the same set at once do not disturb each other.

    Args:
        source: from `find_source`.
        path: file to make; it appears only when complete. Its folder is made if missing.
        image_size: side in pixels, >= 1; of latents their own.
        channels: 1 (grey) or 3 (RGB), of latents their own; None: those of the source.
        skip_bad: leave unreadable files out, listed in the log and in the store's header.
        shard_bytes: of the images in one file, at most (but one image at least).
        progress: called with (files done, files in all).

    Raises:
        OSError: there is too little space for the images.
        UnreadableImagesError: some files cannot be decoded and `skip_bad` is False.
        ValueError: `image_size` or `channels` does not suit, no file can be decoded, or an idx file or one of latents
            is damaged.
    """
    channels = source.channels if channels is None else channels
    check_shape(source, image_size, channels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = _Packing(source, image_size, channels, skip_bad, progress)
    per_part = max(1, shard_bytes // packing.image_bytes)
    if per_part >= packing.total:
        _check_space(path.parent, packing.total * packing.image_bytes)
        with contextlib.suppress(_LeftOut):
            packing.write(path, 0, packing.total, packing.key)
        packing.check()
        _sweep(_folder_of(path), set())
    else:
        _pack_parts(packing, path, per_part)
    for name, reason in packing.bad:
        _log.warning("%s: skipped %s (%s)", source.name, name, reason)
    return ImageStore.open(path)


class _Packing:
    """What the parts of one packing share; `bad` collects what cannot be read."""

    def __init__(
        self, source: Source, image_size: int, channels: int, skip_bad: bool, progress: Progress | None
    ) -> None:
        self.source, self.image_size, self.channels = source, image_size, channels
        self.latents = source.scaling if isinstance(source, LatentSource) else None
        self.total = len(source.labels)
        self.image_bytes = image_size * image_size * channels * (1 if self.latents is None else 2)
        self.key = packing_key(source, image_size, channels)
        self.bad: list[tuple[str, str]] = []
        self._skip_bad, self.progress = skip_bad, progress

    def write(self, path: Path, start: int, stop: int, fingerprint: str) -> None:
        """Write the images ``start .. stop - 1`` to a store; `_LeftOut` if there is nothing to write or it must not
        be."""
        bad: list[tuple[str, str]] = []
        write_store(
            path,
            self._pairs(start, stop, bad),
            image_size=self.image_size,
            channels=self.channels,
            class_names=self.source.class_names,
            source=self.source.name,
            fingerprint=fingerprint,
            skipped=bad,
            attribution=self.source.attribution,
            latents=self.latents,
        )

    def check(self) -> None:
        """Raise UnreadableImagesError if images are left out that must not be, or all are."""
        if self.bad and (not self._skip_bad or len(self.bad) == self.total):
            raise UnreadableImagesError(self.source.name, self.total, self.bad)

    def tell(self, done: int) -> None:
        """Report that the first `done` images have been seen to."""
        if self.progress is not None:
            self.progress(done, self.total)

    def _pairs(self, start: int, stop: int, bad: list[tuple[str, str]]) -> Iterator[tuple[np.ndarray, int]]:
        source = self.source
        if isinstance(source, LatentSource):
            images = read_latents(source, start, stop)
        elif isinstance(source, IdxSource):
            images = read_images(source, self.image_size, self.channels, start, stop)
        else:
            images = decode_range(source, start, stop, self.image_size, self.channels)
        for index, image in enumerate(images, start):
            if isinstance(image, str):
                bad.append((source.item(index), image))
            else:
                yield image, source.labels[index]
            if (index + 1) % _TOLD == 0 or index + 1 == self.total:
                self.tell(index + 1)
        self.bad += bad
        if bad and (not self._skip_bad or len(bad) == stop - start):
            raise _LeftOut


def _pack_parts(packing: _Packing, path: Path, per_part: int) -> None:
    folder = _folder_of(path)
    folder.mkdir(exist_ok=True)
    checksum, labels, parts, shape, bound = hashlib.sha256(), [], [], None, 0.0
    with waiting_lock(folder / ".lock"):
        for start in range(0, packing.total, per_part):
            stop = min(start + per_part, packing.total)
            # The key is in the name, so that what an index of other images names is not touched before it is replaced.
            file = folder / f"{packing.key[:12]}-{start:010d}-{stop:010d}.store"
            part = _whole(file, f"{packing.key}:{start}:{stop}")
            if part is None:
                _check_space(folder, (packing.total - start) * packing.image_bytes)
                try:
                    packing.write(file, start, stop, f"{packing.key}:{start}:{stop}")
                except _LeftOut:
                    continue
                part = ImageStore.open(file)
            else:
                packing.bad += part.header.skipped
                packing.tell(stop)
            step = max(1, CHUNK_BYTES // packing.image_bytes)
            for first in range(0, len(part), step):
                checksum.update(part.images[first : first + step].tobytes())
            labels.append(part.labels.numpy())
            parts.append(Part(file.relative_to(path.parent).as_posix(), len(part), part.header.checksum))
            shape, bound = part.header.shape[1:], max(bound, part.header.bound)
        packing.check()
        of_all = np.concatenate(labels).astype("<i8")
        checksum.update(of_all.tobytes())
        header = StoreHeader(
            shape=(len(of_all), *shape),
            class_names=tuple(packing.source.class_names),
            source=packing.source.name,
            fingerprint=packing.key,
            checksum=checksum.hexdigest(),
            skipped=tuple(packing.bad),
            attribution=packing.source.attribution,
            latents=packing.latents,
            bound=bound,
        )
        write_index(path, header, parts)
        _sweep(folder, {part.file.rpartition("/")[2] for part in parts})


def _folder_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".store") + ".shards")


def _whole(file: Path, fingerprint: str) -> ImageStore | None:
    """The part, if it was written before and is whole."""
    if not file.exists():
        return None
    try:
        part = ImageStore.open(file)
        part.verify()
    except StoreError as error:
        _log.warning("packing a part again: %s", error)
        return None
    return part if part.header.fingerprint == fingerprint else None


def _sweep(folder: Path, keep: set[str]) -> None:
    """Remove what earlier packings to the same name left in the folder of parts, and nothing that has another name."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if (_PART.fullmatch(path.name) and path.name not in keep) or _PART_TEMPORARY.fullmatch(path.name):
            path.unlink()


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise OSError(
            f"{str(folder)!r} has {free / 2**30:.1f} GiB of free space, but the images take {wanted / 2**30:.1f} GiB: "
            "choose another folder, or a smaller size"
        )
