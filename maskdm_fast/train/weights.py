"""The weights of a trained network: read from runs, checkpoints or exported files, and exported."""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maskdm_fast.models import is_official, load_official
from maskdm_fast.train import checkpoint as checkpoints
from maskdm_fast.train.checkpoint import Checkpoint, CheckpointError
from maskdm_fast.train.config import DenoisingConfig, RunConfig
from maskdm_fast.train.extras import require
from maskdm_fast.train.pieces import FileReader, Held, Reader, write_whole

Tensors = dict[str, Tensor]
_KEY = "maskdm_fast"  # of an exported file's metadata
_BEGINNING = 64  # bytes of such a file, in which that key stands
_KEPT = ("step", "images", "config", "class_names", "data")  # of a checkpoint's state
_GROUPS = {"ema": "ema", "raw": "model"}
_SCHEDULES = {"MaskDM": "linear or cosine", "U-ViT": "vp, scaled-linear for U-ViT-H"}
VALUE = "value_"
"""Begins the groups of a checkpoint that are of the value of a run of DxMI."""


@dataclass(frozen=True)
class Weights:
    """A trained network, ready to be built and sampled.

    Attributes:
        config: configuration of the run that trained it.
        tensors: state dict of the model, on the CPU.
        checkpoint: the checkpoint they came from.
        which: ``"ema"`` or ``"raw"``.
        code: which official code wrote them, "MaskDM" or "U-ViT"; None: this library.
    """

    config: RunConfig
    tensors: Tensors
    checkpoint: Checkpoint
    which: str
    code: str | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that the network tells apart, in the order of their labels; empty if it tells none.

        They are those of the data set it was trained on; a checkpoint that does not hold them counts its classes.
        """
        num_classes = self.config.model.num_classes
        return self.known_names or [f"{label:0{len(str(num_classes - 1))}d}" for label in range(num_classes)]

    @property
    def known_names(self) -> list[str]:
        """`class_names` if the checkpoint holds them, else none."""
        names = self.checkpoint.state.get("class_names") or []
        return names if len(names) == self.config.model.num_classes else []

    @property
    def sha256(self) -> str:
        """SHA-256 of names and values of the tensors, hex: tells networks apart, whatever files they came from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def tell_assumed(self) -> None:
        """Say, of official weights, what no file of theirs says and is taken from the run."""
        if self.code is not None:
            print(
                f"{self.checkpoint.path} is a file of {self.code}, which does not name its noise schedule: taken for "
                f"{self.config.diffusion.schedule}; --schedule names another ({_SCHEDULES[self.code]})",
                file=sys.stderr,
                flush=True,
            )

    @cached_property
    def value(self) -> Tensors:
        """State dict of the value that a run of DxMI has trained besides: the raw weights, for it has no average.

        Raises:
            ValueError: there is none.
        """
        tensors = self.checkpoint.tensors(VALUE + _GROUPS["raw"])
        if not tensors:
            raise ValueError(
                f"{self.checkpoint.path} holds no value; runs of DxMI do, but not what export writes of them"
            )
        return tensors


class _ExportedFile(Checkpoint):
    """A file that `export` wrote, in the place of the checkpoint that it came from."""

    @cached_property
    def reader(self) -> FileReader:
        return FileReader({_GROUPS[self.state["which"]]: [self.path]})

    def sha256(self, group: str) -> str:
        return checkpoints.fingerprint(self.path)["sha256"]


def load_weights(path: Path | str, which: Literal["ema", "raw"] = "ema") -> Weights:
    """Read the weights of a run.

    Args:
        path: a run folder (its newest checkpoint), a recipe folder (its last stage that has one), a checkpoint folder,
            or a file that `export` wrote.
        which: the moving average, or the trained weights themselves; an exported file has one of them.

    Raises:
        FileNotFoundError: `path` does not exist, or holds no checkpoint.
        CheckpointError: what is there is damaged.
        ValueError: a file was not exported, or not with the weights that are asked for.
    """
    checkpoint = _find(path, which)
    config = RunConfig.from_dict(checkpoint.state["config"])
    return Weights(config, checkpoint.tensors(_GROUPS[which]), checkpoint, which)


def export(
    path: Path | str, out: Path | str, which: Literal["ema", "raw"] = "ema", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Write the weights of a run to one safetensors file, which needs no other part of the run.

    `load_weights` reads it, and so does any reader of safetensors: names and shapes are those of the state dict of
    `maskdm_fast.models.UViT`, the configuration is in the metadata. One tensor after the other is read from the parts
    of a checkpoint, converted and written, so this takes the memory of the largest of them, not of the network.

    Args:
        path: as in `load_weights`.
        out: the file to make, and its folders; it appears under this name only when it is complete.
        which: the moving average, or the trained weights themselves.
        dtype: of the tensors in the file.

    Returns:
        Where the weights came from.

    Raises:
        As `load_weights`; OSError where `out` cannot be written, ValueError for another `dtype` than float32, bfloat16
        and float16.
    """
    checkpoint, out = _find(path, which), Path(out)
    kept = {name: checkpoint.state[name] for name in _KEPT if name in checkpoint.state}
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, checkpoint.reader, _GROUPS[which], kept, which, dtype)
    return checkpoint


def save_weights(weights: Weights, out: Path) -> None:
    """Write weights to a file that `load_weights` reads; it appears under its name only when it is complete."""
    kept = {name: weights.checkpoint.state[name] for name in _KEPT if name in weights.checkpoint.state}
    group = _GROUPS[weights.which]
    _write(out, Held({group: weights.tensors}), group, {**kept, "config": weights.config.to_dict()}, weights.which)


def _write(
    out: Path,
    reader: Reader,
    group: str,
    kept: dict[str, Any],
    which: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        write_whole(temporary, reader, group, dtype, {_KEY: json.dumps({**kept, "which": which})})
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def load_trained(name: str, folder: Path, which: Literal["ema", "raw"], config: RunConfig, option: str) -> Weights:
    """The weights that an option of a run names: looked up beside the run folder, then from the working directory.

    Args:
        name: as in `load_weights`, or a checkpoint file of the official MaskDM or U-ViT code.
        folder: the run folder.
        which: the moving average, or the trained weights themselves.
        config: of the run, for what an official file does not say.
        option: the option as it was given, for the message.

    Raises:
        As `load_weights`.
    """
    beside = Path(os.path.normpath(folder.parent / name))  # of folders that are not there yet, ../ leads out, too
    path = beside if beside.exists() else Path(name)
    try:
        if is_official(path) and not is_exported(path):
            model = config.model
            heads = {model.dim: model.num_heads}  # a teacher is of any width
            found = load_official(path, which, num_heads=heads, num_classes=model.num_classes or None)
            # Of another code's run the network is known, and that it predicts the noise, as all of theirs do.
            diffusion = replace(config.diffusion, prediction="eps")
            stage = DenoisingConfig(label_drop=0.1 if found.drops_labels else 0.0)
            config = replace(config, model=found.config, diffusion=diffusion, stage=stage)
            return Weights(config, found.tensors, Checkpoint(path, {}), which, found.code)
        return load_weights(path, which)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"nothing to start from: {error} ({option})") from None


def is_exported(path: Path) -> bool:
    """Whether `path` is a file that `export` wrote; CheckpointError if it is damaged."""
    return path.is_file() and _exported_state(path) is not None


def _find(path: Path | str, which: str) -> Checkpoint:
    if which not in _GROUPS:
        raise ValueError(f"which is {which!r}, want 'ema' or 'raw'")
    path = Path(path)
    if path.is_file():
        state = _exported_state(path)
        if state is None:
            raise ValueError(f"{path} was not written by maskdm-fast export; official checkpoints are for --init-from")
        if state["which"] != which:
            raise ValueError(f"{path} holds the {state['which']} weights, not the {which} ones")
        return _ExportedFile(path, state)
    if not path.is_dir():
        raise FileNotFoundError(f"no such run or checkpoint folder: {path}")
    checkpoint = checkpoints.read(path) if (path / checkpoints.MANIFEST_NAME).exists() else checkpoints.newest(path)
    if checkpoint is None:
        checkpoint = next(filter(None, (checkpoints.newest(stage) for stage in reversed(stage_folders(path)))), None)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint; give a run folder, a recipe folder or a checkpoint folder"
        )
    return checkpoint


def is_stage_name(name: str) -> bool:
    """Whether a folder of this name is taken for that of a stage of a recipe."""
    return re.match(r"\d+-", name) is not None


def stage_folders(path: Path) -> list[Path]:
    """The folders of stages of a recipe in `path`, in their order."""
    found = [part for part in path.iterdir() if is_stage_name(part.name)] if path.is_dir() else []
    return sorted(found, key=lambda part: int(part.name.split("-")[0]))


def _exported_state(path: Path) -> dict[str, Any] | None:
    """What `export` wrote beside the tensors; None if it did not write this file, CheckpointError if it is damaged."""
    try:
        with require("safetensors").safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if _KEY not in metadata:
            return None
        state = json.loads(metadata[_KEY])
        missing = [name for name in ("which", "config") if name not in state]
    except (require("safetensors").SafetensorError, ValueError, TypeError) as error:
        with open(path, "rb") as file:
            beginning = file.read(_BEGINNING)
        if f'"{_KEY}"'.encode() not in beginning:
            return None
        raise CheckpointError(
            f"{path} was written by maskdm-fast export and is damaged or truncated: {error}"
        ) from error
    if missing:
        raise CheckpointError(f"{path} was written by maskdm-fast export and is damaged: no {' and no '.join(missing)}")
    return state
