"""Mirrors of the metrics in TensorBoard and Weights & Biases. The horizontal axis is images, as everywhere.

A new tracker is one class with the methods of `Tracker` and one entry in `TRACKERS`.
"""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskdm_fast.train.config_json import flatten
from maskdm_fast.train.extras import require

WANDB_ID_NAME = "wandb-id.txt"
_NOT_VALUES = ("kind", "step", "images")


class Tracker(Protocol):
    """Receives what a run writes to metrics.jsonl and samples/."""

    def log(self, record: dict[str, Any]) -> None:
        """Mirror a line of metrics.jsonl: the numbers in it, at its ``images``."""
        ...

    def image(self, path: Path, images: int) -> None:
        """Mirror a PNG file that was drawn after `images` images."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


class TensorBoardTracker:
    """Event files in the run folder's ``tensorboard/``; implements `Tracker`.

    A resumed run goes on in a file of its own, which tells TensorBoard to forget everything after the checkpoint.

    Args:
        folder: the run folder.
        title: not used; the run is named by its folder.
        config: of the run, shown as text.
        images: images done when this session begins.
    """

    packages = ("tensorboard", "PIL")

    def __init__(self, folder: Path, title: str, config: dict[str, Any], images: int) -> None:
        writer = require("torch.utils.tensorboard", "track").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=images + 1)
        if images == 0:
            text = "\n".join(f"    {key}: {value}" for key, value in flatten(config).items())
            self._writer.add_text("config", text, global_step=0)

    def log(self, record: dict[str, Any]) -> None:
        for name, value in _values(record).items():
            self._writer.add_scalar(name, value, record["images"])

    def image(self, path: Path, images: int) -> None:
        with require("PIL.Image", "track").open(path) as image:
            self._writer.add_image("preview", np.array(image.convert("RGB")), images, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; implements `Tracker`.

    Entity and mode come from wandb's own environment variables and settings, so ``WANDB_MODE=offline`` needs no
    network; the project is WANDB_PROJECT, or maskdm_fast. The id of the run is kept in the run folder, and a
    resumed run goes on under it. Weights & Biases cannot take points back: after a crash those between the checkpoint
    and the crash are there twice, with equal values but for the times.

    Arguments as in `TensorBoardTracker`; `title` is the name of the run.
    """

    packages = ("wandb",)

    def __init__(self, folder: Path, title: str, config: dict[str, Any], images: int) -> None:
        self._wandb = require("wandb", "track")
        path = folder / WANDB_ID_NAME
        if not path.exists():
            path.write_text(secrets.token_hex(8), encoding="utf-8")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "maskdm_fast"),
                name=title,
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                config=config,
            )
        except self._wandb.Error as error:
            raise RuntimeError(
                f"Weights & Biases cannot begin: {str(error).rstrip('.')}. Run 'wandb login', or set WANDB_MODE=offline"
            ) from error
        # The steps of wandb only rise, which would drop the points of a run that fell back to an older checkpoint.
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({"images": record["images"], **_values(record)})

    def image(self, path: Path, images: int) -> None:
        self._run.log({"images": images, "preview": self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}
"""Trackers by their names in `OutputConfig.trackers`."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise RuntimeError that names the extra to install, if a package of one of these trackers is missing."""
    for name in names:
        for package in TRACKERS[name].packages:
            require(package, "track")


def open_trackers(names: Sequence[str], folder: Path, title: str, config: dict[str, Any], images: int) -> list[Tracker]:
    """The trackers of these names; other arguments as in `TensorBoardTracker`."""
    return [TRACKERS[name](folder, title, config, images) for name in names]


def _values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, grouped by its kind where that is not the log: ``score/fd_lite0``."""
    prefix = "" if record.get("kind", "log") == "log" else f"{record['kind']}/"
    return {
        f"{prefix}{name}": value
        for name, value in record.items()
        if name not in _NOT_VALUES and isinstance(value, int | float)
    }
