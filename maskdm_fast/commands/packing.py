"""Pack a set of images, or latents, into a store that runs on any machine open as it is."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from maskdm_fast.data import SHARD_BYTES, ImageStore, LatentScaling, find_source
from maskdm_fast.data import pack as pack_source
from maskdm_fast.train.extras import require
from maskdm_fast.train.progress import format_seconds, step_bar
from maskdm_fast.train.runs import default_cache_dir

tyro = require("tyro")

_LOOKED_AT = 1000


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Decode a set of images once, or import latents, into a store for --data.

    Train does the same in its cache folder. This is for sets that are packed on one machine and used on others, or are
    kept under a name of their own. A set larger than --shard-gib becomes several files in OUT.shards beside the index
    OUT.store, and a packing that was broken off goes on after the last whole file.

    example: maskdm-fast pack "shards/{000..099}.tar" photos.store --image-size 256
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What to pack: a folder of images, tar shards, idx files, latents, emoji; all that --data takes but a store."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.store")]
    """The file to make; one that is there is replaced once the new one is whole."""
    image_size: int | None = None
    """Side in pixels; must be given for images, and latents keep theirs."""
    channels: int | None = None
    """1 turns images grey, 3 gives grey ones three channels. Default: as the images are."""
    scale: float | None = None
    """Of latents z: the store holds (z - shift) * scale. 0.18215 for Stable Diffusion 1 and 2; 1 if they are scaled."""
    shift: float = 0.0
    """See above."""
    skip_bad: bool = False
    """Leave out image files that cannot be read (they are listed), instead of stopping."""
    shard_gib: float = SHARD_BYTES / 2**30
    """Images of one file in GiB, at most."""
    cache_dir: str | None = None
    """Where the index of tar shards is kept; default as in train."""

    def check(self) -> None:
        """Raise ValueError for the first value that cannot work, or does not fit another."""
        if Path(self.out).suffix != ".store" or Path(self.out).is_dir():
            raise ValueError(f"{self.out!r} is no name for a store: want a file named like photos.store")
        if not 0 < self.shard_gib < math.inf:
            raise ValueError(f"--shard-gib is {self.shard_gib}, want more than 0")
        if self.shift and self.scale is None:
            raise ValueError(f"--shift is {self.shift}, but there is no --scale; both are for latents")


def pack(options: PackOptions) -> None:
    """Pack, and say what came out."""
    options.check()
    started = time.monotonic()
    scaling = None if options.scale is None else LatentScaling(options.scale, options.shift)
    with step_bar("indexing") as progress:
        cache_dir = options.cache_dir or default_cache_dir()
        source = find_source(options.source, latents=scaling, cache_dir=cache_dir, progress=progress)
    image_size = options.image_size
    if image_size is None:
        if scaling is None:
            raise ValueError("--image-size is missing: the side in pixels that images are cropped and resized to")
        image_size = source.image_size
    with step_bar("packing") as progress:
        store = pack_source(
            source,
            options.out,
            image_size,
            channels=options.channels,
            skip_bad=options.skip_bad,
            shard_bytes=int(options.shard_gib * 2**30),
            progress=progress,
        )
    print(f"{options.out}: {_summary(store)}, in {format_seconds(time.monotonic() - started)}")


def _summary(store: ImageStore) -> str:
    kind = "images" if store.latents is None else "latents"
    words = [f"{len(store):,} {kind} of {'x'.join(map(str, store.header.shape[1:]))} (height, width, channels)"]
    words.append(f"{len(store.class_names)} classes" if store.class_names else "no classes")
    files = "1 file" if store.num_files == 1 else f"{store.num_files} files"
    words.append(f"{_size(store.nbytes)} in {files}")
    if store.header.skipped:
        words.append(f"{len(store.header.skipped)} left out")
    if store.latents is not None:
        some = np.linspace(0, len(store) - 1, min(len(store), _LOOKED_AT)).astype(np.int64)
        words.append(f"standard deviation {store.images[some].astype(np.float32).std():.3f} (about 1 is wanted)")
    return ", ".join(words)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
