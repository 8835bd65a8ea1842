"""A folder of drawn images with a record of each: it can be trained on, extended, and gone on with after a crash."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskdm_fast.data.sources import IMAGE_SUFFIXES, files_below

MANIFEST_NAME = "manifest.jsonl"
_LOCK_NAME = ".lock"
_SHOWN = 5


@dataclass(frozen=True)
class Drawn:
    """How one image was drawn: a line of the manifest, which decides the image but for rounding.

    Attributes:
        file: path in the folder.
        class_name, label: its class, None where the run has none.
        slot: the image's place in the random draws.
        seed: of the noise.
        sampler, steps, eta, guidance, guidance_interval, value_guidance: as given to ``maskdm-fast sample``.
        checkpoint: folder of the checkpoint.
        weights: "ema" or "raw".
        weights_sha256: of the file of weights.
    """

    file: str
    class_name: str | None
    label: int | None
    slot: int
    seed: int
    sampler: str
    steps: int
    eta: float | None
    guidance: float
    guidance_interval: list[float] | None
    checkpoint: str
    weights: str
    weights_sha256: str
    value_guidance: float = 0.0


def folder_names(class_names: list[str]) -> list[str]:
    """One folder name per class: its own name, but for what no file system takes, and made unique."""
    taken: dict[str, int] = {}
    names = []
    for class_name in class_names:
        # A leading dot would hide the folder from those who read it.
        name = re.sub(r"[/\\\x00-\x1f]", "_", class_name).lstrip(".").strip()[:120] or "_"
        taken[name.lower()] = taken.get(name.lower(), 0) + 1
        names.append(name if taken[name.lower()] == 1 else f"{name}~{taken[name.lower()]}")
    return names


class LabelledFolder:
    """Image files and ``manifest.jsonl``, one line per image; open one with `LabelledFolder.open`.

    A line is on disk before its file appears, and a file appears whole or not at all. So after a crash every file has
    its line, no file is half an image, and a line without a file stands for an image still to be drawn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = path / MANIFEST_NAME
        self._lines = self._read()

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | os.PathLike[str]) -> Iterator["LabelledFolder"]:
        """Open a folder for this process alone, however it ends.

        Args:
            folder: made if missing, and then removed if nothing is written; may hold images drawn before.

        Raises:
            RuntimeError: another process is drawing into it.
            ValueError: it is a file, or holds images without a manifest, which were not drawn; or the manifest is
                damaged other than by a torn last line.
        """
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: want a folder, or a name like {path.stem}.png for a grid")
        if path.is_dir() and not (path / MANIFEST_NAME).exists():
            other = next(files_below(path, IMAGE_SUFFIXES), None)
            if other is not None:
                raise ValueError(f"{path} holds images that were not drawn, such as {other}: choose another --out")
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = path / _LOCK_NAME
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another process is drawing into {path}; choose another --out") from None
            for leftover in path.rglob(".*.png.tmp"):
                leftover.unlink()
            try:
                yield cls(path)
            finally:
                if os.listdir(path) == [_LOCK_NAME]:
                    lock.unlink()
                    if is_new:
                        path.rmdir()

    def missing(self, wanted: list[Drawn]) -> list[Drawn]:
        """Those of `wanted` whose files are not there yet.

        Raises:
            ValueError: a file of that name is there, but was drawn otherwise, or not by this command.
        """
        missing, problems = [], []
        for image in wanted:
            line = self._lines.get(image.file)
            if not (self.path / image.file).exists():
                missing.append(image)
            elif line is None:
                problems.append(f"{image.file} is not in {MANIFEST_NAME}")
            elif changed := _differences(line, asdict(image)):
                problems.append(f"{image.file}: {', '.join(changed)}")
        if problems:
            shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
            more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ValueError(
                f"{self.path} holds images that were drawn otherwise:{shown}{more}\n"
                "Choose another --out or another --seed, or remove these images."
            )
        return missing

    def write(self, images: Iterable[tuple[Drawn, np.ndarray]]) -> None:
        """Add images, uint8 ``[h, w, 1 or 3]``: first their lines, then their files."""
        from maskdm_fast.eval.grid import png_bytes

        images = list(images)
        fresh = [drawn for drawn, _ in images if self._lines.get(drawn.file) != asdict(drawn)]
        with open(self._manifest, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(drawn), ensure_ascii=False) + "\n" for drawn in fresh)
            file.flush()
            os.fsync(file.fileno())
        self._lines.update((drawn.file, asdict(drawn)) for drawn in fresh)
        for drawn, image in images:
            path = self.path / drawn.file
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            with open(temporary, "wb") as file:
                file.write(png_bytes(image))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Lines by file; the last one of a file holds."""
        if not self._manifest.exists():
            return {}
        content = self._manifest.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # A crash tore the last line; its image was not written yet.
            with open(self._manifest, "r+b") as file:
                file.truncate(len(whole))
        lines = {}
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
                lines[line["file"]] = line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._manifest}, line {number}: not a line of a manifest ({error}); mend or remove the line"
                ) from None
        return lines


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    # The folder of the checkpoint may be written in another way, or have moved; its weights are compared instead.
    return [
        f"{key} {old.get(key)} -> {value}"
        for key, value in new.items()
        if key != "checkpoint" and old.get(key) != value
    ]
