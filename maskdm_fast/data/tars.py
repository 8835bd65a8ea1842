"""WebDataset tar shards: where each image lies in them and what its label is, found once and kept."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from maskdm_fast.data.labels import classes_of_texts
from maskdm_fast.data.sources import IMAGE_SUFFIXES, digest, files_below
from maskdm_fast.data.store_file import CHUNK_BYTES, Progress, atomic_file, waiting_lock

TAR_SUFFIXES = frozenset({".tar"})
_log = logging.getLogger(__name__)
_INDEXING = 2  # goes into the name of the index: raise it whenever the same shards would be read otherwise
_KEY = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")
_LABEL_FIELDS = ("label", "class", "cls")
_LABEL_SUFFIXES = ("cls", "json", "txt")
_COMPRESSED = re.compile(r".*\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))", re.IGNORECASE)
_BLOCK = 512


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource:
    """Images in tar files, which are read at their offsets.

    Attributes:
        name: short name for messages and file names.
        shards: the files, in order.
        starts: int64 ``[S + 1]``: shard s holds the images ``starts[s] .. starts[s + 1] - 1``.
        offsets, sizes: int64 ``[n]``, bytes, of every image in its shard.
        labels: int64 ``[n]``; class index, or -1 for all where there are no classes.
        class_names: names of the classes; empty where there are none.
        digests: SHA-256 of every shard, hex.
        fingerprint: hex digest that changes when a shard is added, removed or rewritten.
        attribution: always "": the files do not say whose images they hold.
        channels: of the packed images, unless others are asked for.
    """

    name: str
    shards: tuple[Path, ...]
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    digests: tuple[str, ...]
    fingerprint: str
    attribution: str = ""
    channels: int = 3

    def shard_of(self, index: int) -> Path:
        """The file that holds one image."""
        return self.shards[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def open(self, index: int) -> io.BytesIO:
        """What `decode_image` reads for one image.

        Raises:
            OSError: the shard cannot be read, or ends before the image does.
        """
        return io.BytesIO(self._read(index, int(self.offsets[index]), int(self.sizes[index])))

    def item(self, index: int) -> str:
        """Name of one image, for messages: the shard and, from the block before its data, the file in it."""
        header = self._read(index, int(self.offsets[index]) - _BLOCK, _BLOCK)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            name = f"the file at byte {self.offsets[index]}"
        return f"{self.shard_of(index).name}: {name}"

    def _read(self, index: int, offset: int, size: int) -> bytes:
        # Opened each time: no state to share between threads and processes, and no limit on the number of shards.
        path = self.shard_of(index)
        file = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
        finally:
            os.close(file)
        if len(data) != size:
            raise OSError(f"{str(path)!r} is shorter than when it was indexed; fetch it again")
        return data


def is_tars(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is a tar file or a brace pattern of some by its name, or a folder with tar files."""
    path = Path(name)
    if path.is_dir():
        return any(files_below(path, TAR_SUFFIXES))
    return path.suffix.lower() in TAR_SUFFIXES


def tar_source(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TarSource:
    """The images of WebDataset tar shards: a folder of them, one file, or a pattern such as ``set-{000..099}.tar``.

    Files that follow each other and have the same name up to its first dot are a sample. Its image is the file with a
    suffix of `IMAGE_SUFFIXES`; samples without one are passed over, and so are files whose name begins with a dot. Its
    label is its ``.cls``, else the field "label", "class" or "cls" of its ``.json`` where that is an integer, a text,
    true or false, else its ``.txt``, unless the texts differ in more than half of the samples: then they are captions
    and make no classes. The file of a label is named like the image, or like the sample. Integers become classes in
    numeric order, other labels alphabetically.

    The shards are read once, each from end to end, for the index and the checksums. The index is kept in `cache_dir`
    under a key over names, sizes and modification times; processes that want it at once wait for the first.

    Args:
        name: see above. Folders are read in the order of their names, patterns as they expand.
        cache_dir: folder of the indexes, made if missing; None: the index is not kept.
        progress: called with (shards indexed, shards in all).

    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: a pattern is given, but the package ``braceexpand`` is not installed.
        ValueError: a shard is damaged, compressed, no tar file, or several end to end; a folder holds shards that are
            compressed, or some at its top and some below; a sample has several images, or a file twice; an image is
            no plain file; a label stands apart from its image; some samples have labels and others none; or there are
            no images.
    """
    shards = _expand(name)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    fingerprint = digest([_INDEXING, *stats])
    # A folder and a pattern of the same files share the index.
    one = shards[0].resolve()
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", one.stem if Path(name).is_file() else one.parent.name) or "tars"
    if cache_dir is None:
        return _load(label, shards, fingerprint, _index(shards, progress))
    path = Path(cache_dir) / f"{label[:80]}-{fingerprint[:16]}.index.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(path.with_name(f".{path.name}.lock")):
        arrays = _cached(path)
        if arrays is None:
            arrays = _index(shards, progress)
            with atomic_file(path) as file:
                np.savez(file, **arrays)
    return _load(label, shards, fingerprint, arrays)


def digest_of_shard(path: Path) -> str:
    """SHA-256 of a file, hex."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            checksum.update(data)
    return checksum.hexdigest()


def _tars_of(folder: Path) -> list[Path]:
    found = sorted(files_below(folder, TAR_SUFFIXES))
    shards = [path for path in found if path.parent == folder]
    if not shards:
        raise FileNotFoundError(f"no .tar files at the top of {str(folder)!r}")
    compressed = sorted(path for path in folder.iterdir() if _COMPRESSED.fullmatch(path.name))
    if compressed:
        raise ValueError(
            f"{str(folder)!r} holds compressed shards beside others, first {compressed[0].name}: unpack all"
        )
    if len(shards) < len(found):
        raise ValueError(
            f"{str(folder)!r} holds tar shards both at its top ({len(shards)}) and in sub-folders "
            f"({len(found) - len(shards)}): move all to the top, or give a pattern"
        )
    return shards


def _expand(name: str | os.PathLike[str]) -> tuple[Path, ...]:
    path = Path(name)
    if path.is_dir():
        shards = _tars_of(path)
    elif path.exists() or "{" not in str(name):
        shards = [path]
    else:
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise ImportError("patterns of tar shards need braceexpand: pip install 'maskdm_fast[train]'") from error
        shards = [Path(text) for text in braceexpand(str(name))]
    missing = [path for path in shards if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(shards)} tar shards are not there: first {str(missing[0])!r}")
    return tuple(shards)


def _cached(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as file:
            return dict(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("indexing again: %s is damaged (%s)", path, error)
        return None


def _load(name: str, shards: tuple[Path, ...], fingerprint: str, arrays: dict[str, np.ndarray]) -> TarSource:
    about = json.loads(str(arrays["about"]))
    return TarSource(
        name=name,
        shards=shards,
        starts=arrays["starts"],
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
        labels=arrays["labels"],
        class_names=tuple(about["class_names"]),
        digests=tuple(about["digests"]),
        fingerprint=fingerprint,
    )


@dataclasses.dataclass
class _Shard:
    """What was found in one file: of every image the offset, the size, its label with the suffix it came from, and the
    key of its sample; and the keys of labels without an image."""

    digest: str
    offsets: list[int] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    labels: list[tuple[str, str] | None] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    alone: set[str] = dataclasses.field(default_factory=set)


def _index(shards: Sequence[Path], progress: Progress | None) -> dict[str, np.ndarray]:
    found = []
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, shard in enumerate(pool.map(_index_shard, shards), start=1):
            found.append(shard)
            if progress is not None:
                progress(done, len(shards))
    total = sum(len(shard.offsets) for shard in found)
    if not total:
        raise ValueError(f"no images in {str(shards[0])!r} and {len(shards) - 1} more tar shards")
    labels, class_names = _classes(shards, found)
    about = {"class_names": class_names, "digests": [shard.digest for shard in found]}
    return {
        "starts": np.cumsum([0, *(len(shard.offsets) for shard in found)]),
        "offsets": np.concatenate([np.array(shard.offsets, np.int64) for shard in found]),
        "sizes": np.concatenate([np.array(shard.sizes, np.int64) for shard in found]),
        "labels": labels,
        "about": np.array(json.dumps(about)),
    }


def _index_shard(path: Path) -> _Shard:
    shard, key, files = _Shard(digest_of_shard(path)), None, {}
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                match = _KEY.fullmatch(member.name)
                if member.isdir() or match is None or _META.match(member.name):
                    continue
                if match[1] != key:
                    _add(shard, path, tar, key, files)
                    key, files = match[1], {}
                suffix = match[2].lower()
                if suffix in files:
                    raise ValueError(f"{str(path)!r}: sample {key!r} has .{suffix} twice ({member.name}), want it once")
                files[suffix] = member
            _add(shard, path, tar, key, files)
            raw.seek(tar.offset)
            _expect_end(raw, path)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged, compressed, or no tar file ({error}); fetch it again, or unpack the compression"
        ) from error
    apart = shard.alone.intersection(shard.keys)
    if apart:
        raise ValueError(
            f"{str(path)!r}: label and image of sample {min(apart)!r} do not follow each other: write the shard again, "
            "sorted by name"
        )
    if shard.alone:
        _log.warning("%s: passed over %d labels without an image, first %s", path, len(shard.alone), min(shard.alone))
    return shard


def _expect_end(raw: IO[bytes], path: Path) -> None:
    """Raise ValueError unless zeros follow, at least a block of them, and nothing else.

    tarfile takes a damaged header for the end, and stops at the end of the first of several archives.
    """
    end = raw.tell()
    block = raw.read(_BLOCK)
    if block != bytes(_BLOCK):
        raise ValueError(f"{str(path)!r} is damaged or cut off at byte {end}; fetch it again")
    while block := raw.read(CHUNK_BYTES):
        if block.strip(b"\0"):
            raise ValueError(
                f"{str(path)!r} ends at byte {end}, but more follows: fetch it again, or where it is archives laid end "
                "to end, join them with tar --concatenate"
            )


def _add(shard: _Shard, path: Path, tar: tarfile.TarFile, key: str | None, files: dict[str, tarfile.TarInfo]) -> None:
    """Note the image of a sample, if it has one."""
    images = [suffix for suffix in files if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if not images:
        if not files.keys().isdisjoint(_LABEL_SUFFIXES):
            shard.alone.add(key)
        return
    if len(images) > 1:
        raise ValueError(f"{str(path)!r}: sample {key!r} has several images ({', '.join(images)}), want one")
    image = _plain(path, files[images[0]])
    shard.offsets.append(image.offset_data)
    shard.sizes.append(image.size)
    shard.keys.append(key)
    label, stem = None, images[0].rpartition(".")[0]
    for suffix in _LABEL_SUFFIXES:
        for name in (f"{stem}.{suffix}", suffix):
            if label is None and name in files:
                member = _plain(path, files[name])
                try:
                    label = _label(suffix, tar.extractfile(member).read().decode())
                except ValueError as error:
                    raise ValueError(f"{str(path)!r}: {member.name} is damaged ({error})") from error
    shard.labels.append(label)


def _plain(path: Path, member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The member, or ValueError where its bytes do not lie in it as they are."""
    if not member.isreg() or member.issparse():
        raise ValueError(
            f"{str(path)!r}: {member.name} is a link or sparse, no plain file: write the shard again, with tar "
            "--dereference --hard-dereference"
        )
    return member


def _label(suffix: str, text: str) -> tuple[str, str] | None:
    if suffix == "json":
        fields = json.loads(text)
        values = [fields.get(name) for name in _LABEL_FIELDS] if isinstance(fields, dict) else []
        value = next((value for value in values if value is not None), None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # tables in which some are missing turn integers into floats
        text = str(value) if isinstance(value, int | str) else ""
    text = text.strip()
    return (suffix, text) if text else None


def _classes(shards: Sequence[Path], found: list[_Shard]) -> tuple[np.ndarray, tuple[str, ...]]:
    labels = [label for shard in found for label in shard.labels]
    captions = {label[1] for label in labels if label is not None and label[0] == "txt"}
    if 2 * len(captions) > len(labels):
        labels = [None if label is not None and label[0] == "txt" else label for label in labels]
    texts = [label[1] for label in labels if label is not None]
    if not texts:
        return np.full(len(labels), -1, np.int64), ()
    if len(texts) < len(labels):
        number = labels.index(None)
        for path, shard in zip(shards, found, strict=True):
            if number < len(shard.keys):
                raise ValueError(
                    f"{len(labels) - len(texts)} of {len(labels)} samples have no label, first {shard.keys[number]!r} "
                    f"of {str(path)!r}: label all ({', '.join(f'.{suffix}' for suffix in _LABEL_SUFFIXES)}), or none"
                )
            number -= len(shard.keys)
    return classes_of_texts(texts)
