"""Checkpoints that are either whole or not there.

``checkpoints/step-00001000/`` holds one safetensors file per group of tensors (``model``, ``ema``, ``optimizer``) and
process, ``state.json`` (step, seconds, configuration, running means) and ``manifest.json`` with the size and SHA-256 of
the others. Everything is written under a temporary name and synced to disk, each process its own files; when all are
there the main process writes the manifest and renames the folder. So a crash of any process at any moment leaves the
older checkpoints untouched and at most a temporary folder, which the next start removes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from maskdm_fast.train.extras import require
from maskdm_fast.train.pieces import FileReader, Fragment, Pieces, file_name, group_of, write_pieces
from maskdm_fast.train.world import World

T = TypeVar("T")
Tensors = dict[str, Tensor]

CHECKPOINTS_NAME = "checkpoints"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
FORMAT = 2
_READABLE = (1, 2)  # of format 1 were the checkpoints of single processes, which are the same in format 2

_STEP_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none that is whole can be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files were found whole.

    Attributes:
        path: its folder.
        state: the contents of ``state.json``.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    @cached_property
    def reader(self) -> FileReader:
        """Gives tensors, or ranges of them."""
        files: dict[str, list[Path]] = {}
        for name in self._files():
            if name.endswith(".safetensors"):
                files.setdefault(group_of(name), []).append(self.path / name)
        return FileReader(files)

    def tensors(self, group: str) -> Tensors:
        """The tensors of one group, on the CPU."""
        return {name: self.reader.tensor(group, name) for name in self.reader.names(group)}

    def sha256(self, group: str) -> str:
        """SHA-256 of the files of one group, hex: tells weights apart, wherever they lie."""
        digests = [entry["sha256"] for name, entry in self._files().items() if group_of(name) == group]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def _files(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.path / MANIFEST_NAME).read_text("utf-8"))["files"]


def save(run: Path, pieces: Pieces, state: Mapping[str, Any], *, keep: int, world: World) -> Path:
    """Write a checkpoint of a run and remove all but the `keep` newest. All processes call this.

    Args:
        run: the run folder, which all processes see.
        pieces: what this process has, by group of tensors and name.
        state: JSON values, those of the main process; ``state["step"]`` names the checkpoint.
        keep: how many of the newest stay, at least 1.
        world: the processes.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        PeerError, LostPeerError: that happened to another process, or it ended.
    """
    folder = run / CHECKPOINTS_NAME
    target = folder / f"step-{state['step']:08d}"
    temporary = folder / f"{_TEMPORARY}{target.name}"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> dict[str, Any]:
        names = [file_name(group, world.rank, world.world_size) for group in pieces]
        for name, group in zip(names, pieces.values(), strict=True):
            _write_tensors(temporary / name, group)
        return {name: fingerprint(temporary / name) for name in names}

    def commit() -> None:
        files = {name: entry for part in parts for name, entry in part.items()}
        _write_json(temporary / STATE_NAME, state)
        files[STATE_NAME] = fingerprint(temporary / STATE_NAME)
        _write_json(temporary / MANIFEST_NAME, {"format": FORMAT, "files": dict(sorted(files.items()))})
        _sync(temporary)
        if target.exists():
            # A folder cannot be renamed onto one that has files; the old one has the same step and is not newer.
            os.rename(target, folder / f"{_TEMPORARY}replaced-{target.name}")
        os.rename(temporary, target)
        _sync(folder)

    def tried(action: Callable[[], T]) -> T:
        try:
            return action()
        except (OSError, require("safetensors").SafetensorError) as error:
            newest = next(iter(_candidates(run)), None)
            raise CheckpointError(
                f"cannot write checkpoint {target}: {error}. "
                + (f"The newest checkpoint is {newest}. " if newest else "There is no older checkpoint. ")
                + "Make room or make the folder writable, then run the same command again."
            ) from error

    try:
        world.on_main(lambda: tried(prepare))
        parts = world.everywhere(lambda: tried(write))
        world.on_main(lambda: tried(commit))
    except RuntimeError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main:
        for old in _candidates(run)[keep:]:
            # Renamed first, so that a half-removed checkpoint never stands under its name.
            with contextlib.suppress(OSError):
                os.rename(old, folder / f"{_TEMPORARY}old-{old.name}")
        clean(run)
    return target


def exist(run: Path) -> bool:
    """Whether a folder is that of a run which has got as far as its first checkpoint, whole or not."""
    return bool(_candidates(run))


def clean(run: Path) -> None:
    """Remove what interrupted writes left behind. Only the process that holds the run's lock may call this."""
    for leftover in (run / CHECKPOINTS_NAME).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Open one checkpoint folder after checking the size and SHA-256 of every file.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is another.
    """
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text("utf-8"))
        if manifest["format"] not in _READABLE:
            raise CheckpointError(f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT}")
        for name, want in manifest["files"].items():
            if (path / name).stat().st_size != want["bytes"] or fingerprint(path / name) != want:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
        return Checkpoint(path, json.loads((path / STATE_NAME).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is not whole: {type(error).__name__}: {error}") from error


def newest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder; None if it has no checkpoint at all.

    Damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    candidates = _candidates(run)
    for path in candidates:
        try:
            return read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the one before it", RuntimeWarning, stacklevel=2)
    if candidates:
        raise CheckpointError(f"no checkpoint in {run / CHECKPOINTS_NAME} is whole; remove the folder to start again")
    return None


def resume(run: Path) -> Checkpoint | None:
    """`newest`, after removing leftovers and setting aside (as ``damaged-step-*``) the checkpoints newer than the
    one found.

    Only the process that holds the run's lock may call this.
    """
    clean(run)
    checkpoint = newest(run)
    for path in _candidates(run):
        if checkpoint is None or path == checkpoint.path:
            break
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    return checkpoint


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock ends with the process, however it ends.

    Raises:
        RuntimeError: another process is training in this folder.
    """
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is training in {run}; wait for it, or choose another folder") from None
        yield


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a small JSON file so that it is either the old one or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    _write_json(temporary, value)
    os.replace(temporary, path)
    _sync(path.parent)


def _candidates(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folder = run / CHECKPOINTS_NAME
    found = [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _write_tensors(path: Path, pieces: Mapping[str, Tensor | Fragment]) -> None:
    write_pieces(path, pieces)
    _sync(path)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def fingerprint(path: Path) -> dict[str, Any]:
    """``bytes`` and ``sha256`` of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
