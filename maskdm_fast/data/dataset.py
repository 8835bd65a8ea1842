"""From the name of a data set to an open store: packed the first time, reused while the source is unchanged."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Literal

from maskdm_fast.data.decoding import DecodedStore, decode_range
from maskdm_fast.data.idx import idx_source, is_idx
from maskdm_fast.data.latents import LATENT_SUFFIXES, latent_source
from maskdm_fast.data.packing import SHARD_BYTES, Source, check_shape, pack, packing_key
from maskdm_fast.data.sources import IMAGE_SUFFIXES, UnreadableImagesError, emoji_source, files_below, folder_source
from maskdm_fast.data.store import ImageStore
from maskdm_fast.data.store_file import LatentScaling, Progress, StoreError, atomic_file
from maskdm_fast.data.tars import TAR_SUFFIXES, TarSource, tar_source

Decoding = Literal["packed", "on-the-fly"]

_log = logging.getLogger(__name__)
_TOLD = 512
_KINDS = {"tar shards": TAR_SUFFIXES, "latents": LATENT_SUFFIXES, "images": IMAGE_SUFFIXES}


def find_source(
    name_or_path: str | os.PathLike[str],
    *,
    latents: LatentScaling | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """`emoji_source` for the name "emoji"; else, by what lies there, `idx_source`, `tar_source`, `latent_source` or
    `folder_source`.

    Write "./emoji" for a folder of that name. A packed store is none: `open_dataset` takes it as it is.

    Args:
        name_or_path: see above.
        latents: how latents are scaled; needed for them, and for nothing else.
        cache_dir: where the index of tar shards is kept; None: nowhere.
        progress: of that index, called with (shards indexed, shards in all).

    Raises:
        FileNotFoundError, ImportError, ValueError: as of those functions; or a folder holds data of several kinds,
            `latents` is missing, or out of place.
    """
    is_emoji = str(name_or_path) == "emoji"
    kind = None if is_emoji else _kind(Path(name_or_path))
    if kind == "latents":
        if latents is None:
            raise ValueError(
                f"{str(name_or_path)!r} holds latents: say how they are scaled, (z - shift) * scale, with "
                "--latent-scale (--scale of pack): 0.18215 for Stable Diffusion's autoencoder, 1 if they are already"
            )
        return latent_source(name_or_path, latents)
    if latents is not None:
        raise ValueError(f"{str(name_or_path)!r} holds no latents: leave out their scale and shift")
    if is_emoji:
        return emoji_source()
    if kind == "idx files":
        return idx_source(name_or_path)
    if kind == "tar shards":
        return tar_source(name_or_path, cache_dir=cache_dir, progress=progress)
    return folder_source(name_or_path)


def _kind(path: Path) -> str | None:
    """What lies at `path`, or would by its name; None where that is nothing that is known."""
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in files_below(path, frozenset().union(*_KINDS.values()))}
    elif path.suffix == ".store" and path.exists():
        raise ValueError(f"{str(path)!r} is packed already: give it to --data as it is, or pack what it was made of")
    else:
        suffixes = {path.suffix.lower()}
    kinds = ["idx files"] if is_idx(path) else []
    kinds += [kind for kind, of_kind in _KINDS.items() if suffixes & of_kind]
    if len(kinds) > 1:
        raise ValueError(
            f"{str(path)!r} holds {' and '.join(kinds)}, of which only one kind can be taken: move the others elsewhere"
        )
    return kinds[0] if kinds else None


def open_dataset(
    name_or_path: str | os.PathLike[str],
    image_size: int,
    *,
    channels: int | None = None,
    cache_dir: str | os.PathLike[str],
    skip_bad: bool = False,
    latents: LatentScaling | None = None,
    decoding: Decoding = "packed",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> ImageStore:
    """Open a data set, packing it into `cache_dir` unless that was done before.

    The cache file is named by the source, the size and a key over names, sizes and modification times of the files (for
    "emoji": the versions of its packages), so a changed folder is packed anew under another name. A cache file that
    cannot be opened is packed again. Processes that pack the same set at once do not disturb each other.

    Args:
        name_or_path: "emoji" for the default set; a folder of images (see `folder_source`); MNIST-style idx files (see
            `idx_source`); WebDataset tar shards (see `tar_source`); latents (see `latent_source`); or a packed store (a
            file named ``*.store``), which is opened as it is.
        image_size: side in pixels. Images are centre-cropped to a square and resized; 28x28 pixels of an idx file get a
            black border instead where `image_size` is 32. Latents and packed stores must have it.
        channels: 1 (grey) or 3 (RGB), converting if need be; None: 1 of idx files, 3 of image files, those of a store
            or of latents.
        cache_dir: folder of the stores; made if missing.
        skip_bad: as in `pack`.
        latents: how latents are scaled; None for images, and for a store, which knows.
        decoding: "on-the-fly" packs nothing: the images of tar shards, and of nothing else, are decoded each time they
            are asked for. With `skip_bad` all are decoded once to find the bad ones, which are remembered.
        shard_bytes: as in `pack`.
        progress: as in `pack`, and before that of tar shards that are indexed; not called where all is there already.

    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: Pillow, or for "emoji" its packages, are not installed.
        StoreError: a file named ``*.store`` is none that this version can read.
        UnreadableImagesError: some files cannot be decoded (now or when the store was packed) and `skip_bad` is False.
        ValueError: the folder has no images, or mixes images with class folders; a file other than an image is damaged;
            a packed store or latents are of another size, other channels, or another scale; or something but tar shards
            is to be decoded on the fly.
    """
    if Path(name_or_path).suffix == ".store" and not Path(name_or_path).is_dir():
        if decoding != "packed":
            raise ValueError(f"{str(name_or_path)!r} is packed: leave out --decoding {decoding}")
        return _open_packed(Path(name_or_path), image_size, channels, latents)
    source = find_source(name_or_path, latents=latents, cache_dir=cache_dir, progress=progress)
    channels = source.channels if channels is None else channels
    check_shape(source, image_size, channels)
    key = packing_key(source, image_size, channels)
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.name)[:80]
    stem = Path(cache_dir) / f"{safe_name}-{image_size}px-{key[:16]}"
    if decoding == "on-the-fly":
        return _open_on_the_fly(source, image_size, channels, key, stem, skip_bad=skip_bad, progress=progress)
    path = stem.with_name(f"{stem.name}.store")
    store = None
    if path.exists():
        try:
            store = ImageStore.open(path)
        except StoreError as error:
            _log.warning("packing %s again: %s", source.name, error)
    if store is None or store.header.fingerprint != key:
        store = pack(
            source,
            path,
            image_size,
            channels=channels,
            skip_bad=skip_bad,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    if store.header.skipped and not skip_bad:
        raise UnreadableImagesError(source.name, len(source.labels), list(store.header.skipped))
    return store


def _open_packed(path: Path, image_size: int, channels: int | None, latents: LatentScaling | None) -> ImageStore:
    store = ImageStore.open(path)
    channels = store.channels if channels is None else channels
    held, want = store.header.shape[1:], (image_size, image_size, channels)
    if held != want:
        kind = "images" if store.latents is None else "latents"
        raise ValueError(
            f"{str(path)!r} holds {kind} of {'x'.join(map(str, held))} (height, width, channels), want "
            f"{'x'.join(map(str, want))}: pack it again in that shape, or change the model's image_size and channels"
        )
    if latents is not None and latents != store.latents:
        held = (
            "images"
            if store.latents is None
            else f"latents of scale {store.latents.scale} and shift {store.latents.shift}"
        )
        raise ValueError(
            f"{str(path)!r} holds {held}, not latents of scale {latents.scale} and shift {latents.shift}: leave out "
            "--latent-scale and --latent-shift, the store knows them"
        )
    return store


def _open_on_the_fly(
    source: Source,
    image_size: int,
    channels: int,
    key: str,
    stem: Path,
    *,
    skip_bad: bool,
    progress: Progress | None,
) -> DecodedStore:
    if not isinstance(source, TarSource):
        raise ValueError(
            f"{source.name!r} is not made of tar shards, and only those are decoded on the fly: leave out --decoding"
        )
    bad = []
    if skip_bad:
        path = stem.with_name(f"{stem.name}.bad.json")
        if not path.exists():
            found = _find_bad(source, image_size, channels, progress)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(json.dumps(found).encode())
        bad = [(index, reason) for index, reason in json.loads(path.read_text("utf-8"))]
        if len(bad) == len(source.labels):
            raise UnreadableImagesError(source.name, len(bad), [(source.item(index), text) for index, text in bad])
    return DecodedStore(source, image_size, channels, fingerprint=key, bad=bad)


def _find_bad(source: TarSource, image_size: int, channels: int, progress: Progress | None) -> list[tuple[int, str]]:
    """Number and reason of every image that cannot be decoded."""
    bad, total = [], len(source.labels)
    for index, image in enumerate(decode_range(source, 0, total, image_size, channels)):
        if isinstance(image, str):
            bad.append((index, image))
        if progress is not None and ((index + 1) % _TOLD == 0 or index + 1 == total):
            progress(index + 1, total)
    for index, reason in bad:
        _log.warning("%s: skipped %s (%s)", source.name, source.item(index), reason)
    return bad
