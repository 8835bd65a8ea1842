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

from maskdm_fast.data.idx import IdxSource, idx_source, is_idx, read_images
from maskdm_fast.data.sources import ImageSource, decode_image, emoji_source, folder_source
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


def find_source(name_or_path: str | os.PathLike[str]) -> ImageSource | IdxSource:
    """`emoji_source` for the name "emoji", `idx_source` where `is_idx` says so, else `folder_source`.

    Write "./emoji" for a folder of that name.
    """
    if str(name_or_path) == "emoji":
        return emoji_source()
    return idx_source(name_or_path) if is_idx(name_or_path) else folder_source(name_or_path)


def _packing_key(source: ImageSource | IdxSource, image_size: int, channels: int) -> str:
    converted = [channels] if channels != source.channels else []
    return hashlib.sha256(json.dumps([source.fingerprint, image_size, _PACKING, *converted]).encode()).hexdigest()


def _decode_all(
    source: ImageSource, image_size: int, channels: int, bad: list[tuple[str, str]], progress: Progress | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Decode in order, in threads (Pillow releases the GIL); damaged files are appended to `bad`."""

    def decode(name: str) -> np.ndarray | str:
        try:
            return decode_image(source.root / name, image_size, channels)
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


def _read_all(
    source: IdxSource, image_size: int, channels: int, progress: Progress | None
) -> Iterator[tuple[np.ndarray, int]]:
    total = len(source.labels)
    for done, image in enumerate(read_images(source, image_size, channels), start=1):
        yield image, source.labels[done - 1]
        if progress is not None and (done % _CHUNK == 0 or done == total):
            progress(done, total)


def pack(
    source: ImageSource | IdxSource,
    path: str | os.PathLike[str],
    image_size: int,
    *,
    channels: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageStore:
    """Decode every image of a source into a store at `path`, and open it.

    Args:
        source: from `find_source`.
        path: file to make; it appears only when complete. Its folder is made if missing.
        image_size: side in pixels, >= 1.
        channels: 1 (grey) or 3 (RGB); None: those of the source.
        skip_bad: leave unreadable files out, listed in the log and in the store's header.
        progress: called with (files done, files in all).

    Raises:
        UnreadableImagesError: some files cannot be decoded and `skip_bad` is False.
        ValueError: `image_size` or `channels` is out of range, no file can be decoded, or an idx file is damaged.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}, want at least 1")
    channels = source.channels if channels is None else channels
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, want 1 (grey) or 3 (RGB)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    bad: list[tuple[str, str]] = []

    def images() -> Iterator[tuple[np.ndarray, int]]:
        if isinstance(source, IdxSource):
            yield from _read_all(source, image_size, channels, progress)
            return
        yield from _decode_all(source, image_size, channels, bad, progress)
        if bad and (not skip_bad or len(bad) == len(source.files)):
            raise UnreadableImagesError(source.name, len(source.files), bad)

    write_store(
        path,
        images(),
        image_size=image_size,
        channels=channels,
        class_names=source.class_names,
        source=source.name,
        fingerprint=_packing_key(source, image_size, channels),
        skipped=bad,
        attribution=source.attribution,
    )
    for name, reason in bad:
        _log.warning("%s: skipped %s (%s)", source.name, name, reason)
    return ImageStore.open(path)


def open_dataset(
    name_or_path: str | os.PathLike[str],
    image_size: int,
    *,
    channels: int | None = None,
    cache_dir: str | os.PathLike[str],
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageStore:
    """Open a data set, packing it into `cache_dir` unless that was done before.

    The cache file is named by the source, the size and a key over names, sizes and modification times of the files (for
    "emoji": the versions of its packages), so a changed folder is packed anew under another name. A cache file that
    cannot be opened is packed again. Processes that pack the same set at once do not disturb each other.

    Args:
        name_or_path: "emoji" for the default set; a folder of images (see `folder_source`); MNIST-style idx files (see
            `idx_source`); or a packed store (a file named ``*.store``), which is opened as it is.
        image_size: side in pixels. Images are centre-cropped to a square and resized; 28x28 pixels of an idx file get a
            black border instead where `image_size` is 32.
        channels: 1 (grey) or 3 (RGB), converting if need be; None: 1 of idx files, 3 of image files, those of a store.
        cache_dir: folder of the stores; made if missing.
        skip_bad: as in `pack`.
        progress: as in `pack`; not called where the store is there already.

    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: Pillow, or for "emoji" its packages, are not installed.
        StoreError: a file named ``*.store`` is none that this version can read.
        UnreadableImagesError: some files cannot be decoded (now or when the store was packed) and `skip_bad` is False.
        ValueError: the folder has no images, or mixes images with class folders; an idx file is damaged; or a packed
            store has images of another size or other channels.
    """
    if Path(name_or_path).suffix == ".store" and not Path(name_or_path).is_dir():
        return _open_packed(Path(name_or_path), image_size, channels)
    source = find_source(name_or_path)
    channels = source.channels if channels is None else channels
    key = _packing_key(source, image_size, channels)
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.name)[:80]
    path = Path(cache_dir) / f"{safe_name}-{image_size}px-{key[:16]}.store"
    store = None
    if path.exists():
        try:
            store = ImageStore.open(path)
        except StoreError as error:
            _log.warning("packing %s again: %s", source.name, error)
    if store is None or store.header.fingerprint != key:
        store = pack(source, path, image_size, channels=channels, skip_bad=skip_bad, progress=progress)
    if store.header.skipped and not skip_bad:
        raise UnreadableImagesError(source.name, len(source.labels), list(store.header.skipped))
    return store


def _open_packed(path: Path, image_size: int, channels: int | None) -> ImageStore:
    store = ImageStore.open(path)
    channels = store.channels if channels is None else channels
    held, want = store.header.shape[1:], (image_size, image_size, channels)
    if held != want:
        raise ValueError(
            f"{str(path)!r} holds images of {'x'.join(map(str, held))} (height, width, channels), want "
            f"{'x'.join(map(str, want))}: pack it again in that shape, or change the model's image_size and channels"
        )
    return store
