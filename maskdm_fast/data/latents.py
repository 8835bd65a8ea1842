"""Latents that an autoencoder made of images beforehand, from .npy, .npz and .safetensors files."""

import dataclasses
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from maskdm_fast.data.labels import classes_of_values
from maskdm_fast.data.sources import digest, files_below
from maskdm_fast.data.store_file import LatentScaling

LATENT_SUFFIXES = frozenset({".npy", ".npz", ".safetensors"})
_LABELS_MARK = "-labels"
_LATENTS, _LABELS = "latents", "labels"
_CHUNK = 256
_FLOATS = ("float16", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource:
    """Latents in files, in a fixed order.

    Attributes:
        name: short name for messages and file names.
        files: where they are.
        starts: int64 ``[F + 1]``: file f holds the latents ``starts[f] .. starts[f + 1] - 1``.
        shape: ``(C, h, w)`` of a latent, h = w.
        scaling: what makes x0 of them.
        labels: int64 ``[n]``; class index, or -1 for all where there are no classes.
        class_names: names of the classes; empty where there are none.
        fingerprint: hex digest that changes when a file is added, removed or rewritten, or with the scaling.
        attribution: always "": the files do not say whose images they were.
    """

    name: str
    files: tuple[Path, ...]
    starts: np.ndarray
    shape: tuple[int, int, int]
    scaling: LatentScaling
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    attribution: str = ""

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Side of a latent."""
        return self.shape[1]


def latent_source(name: str | os.PathLike[str], scaling: LatentScaling) -> LatentSource:
    """The latents of a file, or of all files below a folder, sorted by name.

    A file holds latents ``[n, C, h, w]``, or one ``[C, h, w]``, of float16, float32 or (safetensors) bfloat16: an .npy
    file as it is, .npz and .safetensors under the name "latents". Labels are integers ``[n]``: under the name "labels"
    in the same file, or for ``NAME.npy`` in ``NAME-labels.npy`` beside it; the values that occur are the classes. Where
    no file has labels, first-level sub-folders are classes. Hidden files and folders are passed over, links followed.

    Args:
        name: see above.
        scaling: of the autoencoder; ``LatentScaling(1.0)`` where the files hold x0 already.

    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: safetensors is not installed.
        ValueError: a file is damaged or holds something else; latents differ in shape or are not square; some files
            have labels and others none; a file of labels belongs to none of latents; or there are no files.
    """
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {str(path)!r}")
    scaling.check()
    files = _files_of(path)
    if not files:
        raise ValueError(f"no latents below {str(path)!r}: want files named {', '.join(sorted(LATENT_SUFFIXES))}")
    counts, labels, shape = [], [], None
    for file in files:
        held = _File.open(file)
        shape = held.shape[1:] if shape is None else shape
        if held.shape[1:] != shape:
            raise ValueError(
                f"latents of {str(file)!r} are {list(held.shape[1:])} (C, h, w), of {str(files[0])!r} {list(shape)}"
            )
        counts.append(held.shape[0])
        labels.append(held.labels)
    if shape[1] != shape[2]:
        raise ValueError(f"latents of {str(files[0])!r} are {shape[1]}x{shape[2]}, want them square")
    of_all, class_names = _classes(path, files, counts, labels)
    stats = [
        (file.relative_to(path).as_posix() if path.is_dir() else file.name, *_stat(file), *_stat(_labels_file(file)))
        for file in files
    ]
    return LatentSource(
        name=re.sub(r"[^A-Za-z0-9._-]+", "_", path.resolve().name) or "latents",
        files=tuple(files),
        starts=np.cumsum([0, *counts]),
        shape=shape,
        scaling=scaling,
        labels=of_all,
        class_names=class_names,
        fingerprint=digest([stats, scaling]),
    )


def read_latents(source: LatentSource, start: int, stop: int) -> Iterator[np.ndarray]:
    """x0 of the latents ``start .. stop - 1``: ``(z - shift) * scale``, computed in float32.

    Yields:
        float16 ``[h, w, C]``.

    Raises:
        ValueError: a value is not finite, or not in float16's range.
    """
    for number, file in enumerate(source.files):
        first, end = max(start, int(source.starts[number])), min(stop, int(source.starts[number + 1]))
        if first >= end:
            continue
        held = _File.open(file)
        for begin in range(first, end, _CHUNK):
            place = begin - int(source.starts[number])
            z = held.read(place, min(begin + _CHUNK, end) - begin)
            with np.errstate(over="ignore"):
                x0 = ((z - np.float32(source.scaling.shift)) * np.float32(source.scaling.scale)).astype(np.float16)
            if not np.isfinite(x0).all():
                bad = place + int(np.flatnonzero(~np.isfinite(x0).reshape(len(x0), -1).all(axis=1))[0])
                raise ValueError(
                    f"latent {bad} of {str(file)!r} has a value that is not finite, or beyond 65504 once it is scaled: "
                    "extract it again, or check the scale"
                )
            yield from np.ascontiguousarray(x0.transpose(0, 2, 3, 1))


def _files_of(path: Path) -> list[Path]:
    """The file, or all below the folder; ValueError where labels belong to none of them."""
    if path.is_dir():
        found = sorted(files_below(path, LATENT_SUFFIXES))
        files = [file for file in found if not file.stem.endswith(_LABELS_MARK)]
        used = {*files, *map(_labels_file, files)}
        unused = [file for file in found if file not in used]
    else:
        files, beside = [path], path.with_name(f"{path.stem}{_LABELS_MARK}.npy")
        has_labels = path.suffix.lower() == ".npy" or path.with_suffix(".npy").exists()
        unused = [beside] if beside.exists() and not has_labels else []
    if unused:
        raise ValueError(
            f"{str(unused[0])!r} belongs to no file of latents: labels of NAME.npy are in NAME{_LABELS_MARK}.npy, of "
            f".npz and .safetensors in the file itself, under the name {_LABELS!r}"
        )
    return files


def _labels_file(path: Path) -> Path | None:
    beside = path.with_name(f"{path.stem}{_LABELS_MARK}.npy")
    # A link to nothing counts: labels that are missed are told, and not left out.
    return beside if path.suffix.lower() == ".npy" and os.path.lexists(beside) else None


def _stat(path: Path | None) -> tuple[int, ...]:
    return () if path is None else (path.stat().st_size, path.stat().st_mtime_ns)


@dataclasses.dataclass
class _File:
    """An opened file; `rows` takes a slice of its array, as numpy or torch."""

    rows: Callable[[slice], np.ndarray | Tensor]
    is_single: bool
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None

    @classmethod
    def open(cls, path: Path) -> "_File":
        try:
            rows, shape, dtype, labels = _OPEN[path.suffix.lower()](path)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{str(path)!r} is damaged, or holds no latents: {error}") from error
        if dtype not in _FLOATS or len(shape) not in (3, 4) or 0 in shape:
            raise ValueError(
                f"{str(path)!r} holds {dtype} {list(shape)}, want latents [n, C, h, w] of {', '.join(_FLOATS)}"
            )
        count = shape[0] if len(shape) == 4 else 1
        if labels is not None:
            labels = labels.reshape(-1)
            if labels.dtype.kind not in "iu" or len(labels) != count or labels.min() < 0:
                raise ValueError(
                    f"labels of {str(path)!r} are {labels.dtype} [{len(labels)}], want integers from 0, one for each "
                    f"of {count} latents"
                )
            labels = labels.astype(np.int64)
        return cls(rows, len(shape) == 3, (count, *shape[-3:]), labels)

    def read(self, start: int, count: int) -> np.ndarray:
        """float32 ``[count, C, h, w]``."""
        rows = self.rows(slice(None) if self.is_single else slice(start, start + count))
        # Through torch, because numpy has no bfloat16.
        rows = rows.float().numpy() if isinstance(rows, Tensor) else rows.astype(np.float32)
        return rows.reshape(count, *self.shape[1:])


def _open_npy(path: Path) -> tuple:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    beside = _labels_file(path)
    labels = None if beside is None else np.load(beside, allow_pickle=False)
    return array.__getitem__, array.shape, str(array.dtype), labels


def _open_npz(path: Path) -> tuple:
    with np.load(path, allow_pickle=False) as file:
        array = file[_LATENTS]
        return array.__getitem__, array.shape, str(array.dtype), file.get(_LABELS)


def _open_safetensors(path: Path) -> tuple:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading .safetensors needs safetensors: pip install 'maskdm_fast[train]'") from error

    def rows(part: slice) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(_LATENTS)[part]

    try:
        with safe_open(path, framework="pt") as file:
            shape = tuple(file.get_slice(_LATENTS).get_shape())
            labels = file.get_tensor(_LABELS).numpy() if _LABELS in set(file.keys()) else None
        return rows, shape, str(rows(slice(0, 1)).dtype).removeprefix("torch."), labels
    except SafetensorError as error:
        raise ValueError(str(error)) from error


_OPEN = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}


def _classes(
    root: Path, files: list[Path], counts: list[int], labels: list[np.ndarray | None]
) -> tuple[np.ndarray, tuple[str, ...]]:
    without = [file for file, held in zip(files, labels, strict=True) if held is None]
    if not without:
        return classes_of_values(np.concatenate(labels))
    if len(without) < len(files):
        raise ValueError(f"{len(without)} of {len(files)} files of latents have no labels, first {str(without[0])!r}")
    folders = [file.relative_to(root).parts[0] if file.parent != root else "" for file in files if root.is_dir()]
    names = sorted(set(folders))
    if not any(names):
        return np.full(sum(counts), -1, np.int64), ()
    if "" in names:
        raise ValueError(f"{str(root)!r} holds latents both at its top and in sub-folders: move all into sub-folders")
    return np.repeat([names.index(name) for name in folders], counts).astype(np.int64), tuple(names)
