"""From the name of a data set to an open store: packed the first time, reused while the source is unchanged."""

import concurrent.futures
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maskdm_fast.data.sources import ImageSource, decode_image, find_source
from maskdm_fast.data.store import ImageStore, Progress, StoreError, write_store

_log = logging.getLogger(__name__)
_PACKING = 1  # goes into the cache key: raise it whenever the same files would decode to other bytes
_CHUNK = 512
_SHOWN = 10


class UnreadableImagesError(ValueError):
    """Some image files cannot be decoded; `files` holds pairs (file, reason)."""

    def __init__(self, source: str, total: int, files: list[tuple[str, str]]) -> None:
        self.files = files
        more = f"\n  ... and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        names = "".join(f"\n  {name}: {reason}" for name, reason in files[:_SHOWN])
        super().__init__(
            f"{len(files)} of {total} images of {source!r} cannot be read:{names}{more}\n"
            "Repair or remove them, or leave them out with skip_bad=True (--skip-bad)."
        )


def _packing_key(source: ImageSource, image_size: int) -> str:
    return hashlib.sha256(json.dumps([source.fingerprint, image_size, _PACKING]).encode()).hexdigest()


def _decode_all(
    source: ImageSource, image_size: int, bad: list[tuple[str, str]], progress: Progress | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Decode in order, in threads (Pillow releases the GIL); damaged files are appended to `bad`."""

    def decode(name: str) -> np.ndarray | str:
        try:
            return decode_image(source.root / name, image_size)
        except ImportError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
            return f"{type(error).__name__}: {error}"

    total = len(source.files)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In chunks, because `map` queues all its work at once and finished images would pile up.
        for start in range(0, total, _CHUNK):
            names = source.files[start : start + _CHUNK]
            for name, label, image in zip(
                names, source.labels[start : start + _CHUNK], pool.map(decode, names), strict=True
            ):
                if isinstance(image, str):
                    bad.append((name, image))
                else:
                    yield image, label
            if progress is not None:
                progress(min(start + _CHUNK, total), total)


def pack(
    source: ImageSource,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageStore:
    """Decode every image of a source into a store at `path`, and open it.

    Args:
        source: from `folder_source` or `emoji_source`.
        path: file to make; it appears only when complete. Its folder is made if missing.
        image_size: side in pixels, >= 1.
        skip_bad: leave unreadable files out, listed in the log and in the store's header.
        progress: called with (files done, files in all).

    Raises:
        UnreadableImagesError: some files cannot be decoded and `skip_bad` is False.
        ValueError: `image_size` < 1, or no file can be decoded.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}, want at least 1")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    bad: list[tuple[str, str]] = []

    def images() -> Iterator[tuple[np.ndarray, int]]:
        yield from _decode_all(source, image_size, bad, progress)
        if bad and (not skip_bad or len(bad) == len(source.files)):
            raise UnreadableImagesError(source.name, len(source.files), bad)

    write_store(
        path,
        images(),
        image_size=image_size,
        class_names=source.class_names,
        source=source.name,
        fingerprint=_packing_key(source, image_size),
        skipped=bad,
        attribution=source.attribution,
    )
    for name, reason in bad:
        _log.warning("%s: skipped %s (%s)", source.name, name, reason)
    return ImageStore.open(path)


def open_dataset(
    name_or_folder: str | os.PathLike[str],
    image_size: int,
    *,
    cache_dir: str | os.PathLike[str],
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageStore:
    """Open a data set, packing it into `cache_dir` unless that was done before.

    The cache file is named by the source, the size and a key over names, sizes and modification times of the files (for
    "emoji": the versions of its packages), so a changed folder is packed anew under another name. A cache file that
    cannot be opened is packed again. Processes that pack the same set at once do not disturb each other.

    Args:
        name_or_folder: "emoji" for the default set, or a folder of images (see `folder_source`).
        image_size: side in pixels; images are centre-cropped to a square and resized.
        cache_dir: folder of the stores; made if missing.
        skip_bad: as in `pack`.
        progress: as in `pack`; not called where the store is there already.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: Pillow, or for "emoji" its packages, are not installed.
        UnreadableImagesError: some files cannot be decoded (now or when the store was packed) and `skip_bad` is False.
        ValueError: the folder has no images, or mixes images with class folders.
    """
    source = find_source(name_or_folder)
    key = _packing_key(source, image_size)
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.name)[:80]
    path = Path(cache_dir) / f"{safe_name}-{image_size}px-{key[:16]}.store"
    store = None
    if path.exists():
        try:
            store = ImageStore.open(path)
        except StoreError as error:
            _log.warning("packing %s again: %s", source.name, error)
    if store is None or store.header.fingerprint != key:
        store = pack(source, path, image_size, skip_bad=skip_bad, progress=progress)
    if store.header.skipped and not skip_bad:
        raise UnreadableImagesError(source.name, len(source.files), list(store.header.skipped))
    return store
