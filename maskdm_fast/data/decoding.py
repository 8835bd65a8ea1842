"""Decoding image files in threads: while packing, or each time an image is asked for."""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Iterable, Iterator

import numpy as np

from maskdm_fast.data.sources import ImageSource, UnreadableImagesError, decode_image, digest
from maskdm_fast.data.store import ImageRows, ImageStore
from maskdm_fast.data.store_file import StoreError, StoreHeader
from maskdm_fast.data.tars import TarSource, digest_of_shard

_MAX_THREADS = 16
_CHUNK = 512


def decode_some(
    source: ImageSource | TarSource,
    indices: Iterable[int],
    image_size: int,
    channels: int,
    pool: concurrent.futures.Executor,
) -> Iterator[np.ndarray | str]:
    """The images of a source at `indices`, in their order; of one that cannot be decoded, the reason."""

    def decode(index: int) -> np.ndarray | str:
        opened = source.open(index)
        try:
            return decode_image(opened, image_size, channels)
        except ImportError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
            return f"{type(error).__name__}: {_reason(error)}"

    return pool.map(decode, indices)


def _reason(error: Exception) -> str:
    """What an error says, without the file's folder or address in memory: it stands in headers, which are the same
    everywhere."""
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"(cannot identify image file) .*", r"\1", text, flags=re.DOTALL)


def decoding_pool() -> concurrent.futures.ThreadPoolExecutor:
    """Threads for `decode_some`, one for each core that this process may use; Pillow releases the GIL."""
    return concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))


def decode_range(
    source: ImageSource | TarSource, start: int, stop: int, image_size: int, channels: int
) -> Iterator[np.ndarray | str]:
    """`decode_some` of ``start .. stop - 1``, with bounded memory."""
    with decoding_pool() as pool:
        # In chunks, because `map` queues all its work at once and finished images would pile up.
        for begin in range(start, stop, _CHUNK):
            yield from decode_some(source, range(begin, min(begin + _CHUNK, stop)), image_size, channels, pool)


class DecodedImages(ImageRows):
    """Images of a source, decoded when they are taken.

    Args:
        source: where they are.
        chosen: int64 ``[n]``, those of the source that count.
        image_size: side in pixels.
        channels: 1 or 3.
    """

    def __init__(self, source: TarSource, chosen: np.ndarray, image_size: int, channels: int) -> None:
        super().__init__((len(chosen), image_size, image_size, channels), np.dtype(np.uint8))
        self._source, self._chosen = source, chosen
        self._pool = decoding_pool()

    def _take(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        wanted = self._chosen[indices].tolist()
        bad = {}  # by index, because a batch may hold an image more than once
        for place, image in enumerate(decode_some(self._source, wanted, *self.shape[2:], self._pool)):
            if isinstance(image, str):
                bad[wanted[place]] = image
            else:
                out[place] = image
        if bad:
            files = [(self._source.item(index), reason) for index, reason in sorted(bad.items())]
            raise UnreadableImagesError(self._source.name, len(self), files)
        return out


class DecodedStore(ImageStore):
    """Used like an `ImageStore`, but nothing is packed: images stay in their tar shards.

    Batches are bit-identical to those of the packed store. The checksum is another one: over the bytes of the shards
    and over what decides how they are decoded.

    Args:
        source: the shards.
        image_size: side in pixels.
        channels: 1 or 3.
        fingerprint: of the source and of how it is decoded.
        bad: number and reason of the images to leave out.
    """

    is_mapped = False

    def __init__(
        self, source: TarSource, image_size: int, channels: int, *, fingerprint: str, bad: list[tuple[int, str]]
    ) -> None:
        chosen = np.delete(np.arange(len(source.labels)), [index for index, _ in bad])
        labels = source.labels[chosen]
        which = hashlib.sha256(np.stack((chosen, labels)).astype("<i8").tobytes()).hexdigest()
        header = StoreHeader(
            shape=(len(chosen), image_size, image_size, channels),
            class_names=source.class_names,
            source=source.name,
            fingerprint=fingerprint,
            checksum=digest([source.digests, which, image_size, channels]),
            skipped=tuple((source.item(index), reason) for index, reason in bad),
            attribution=source.attribution,
        )
        self._source = source
        super().__init__(source.shards[0], header, DecodedImages(source, chosen, image_size, channels), labels)

    def verify(self) -> None:
        """Read all shards and compare their checksums.

        Raises:
            StoreError: a shard has changed since it was indexed.
        """
        for path, wanted in zip(self._source.shards, self._source.digests, strict=True):
            if digest_of_shard(path) != wanted:
                raise StoreError(f"{str(path)!r} has changed since it was indexed: fetch it again")
