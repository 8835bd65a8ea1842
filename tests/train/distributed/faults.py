"""What goes wrong in one process of a distributed run, and what it writes down: contexts with one argument each."""

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from maskdm_fast.diffusion import MaskedObjective
from maskdm_fast.distill import Generator
from maskdm_fast.train import checkpoint, metrics, zero_engine
from maskdm_fast.train.loss_scale import LossScale
from maskdm_fast.train.stages import DenoisingStage


@contextlib.contextmanager
def record(path: str) -> Iterator[None]:
    """Write what every image was trained on, as JSON lines: step, slot, t, loss, label, and a hash of the noisy visible
    patches and their places, in which image, flip, mask, t and noise show."""
    call, rows = MaskedObjective.__call__, []

    def spy(objective, model, images, labels, *, step, slots, **rest):
        seen = {}

        def network(tokens, t, ids_keep, labels, **packed):
            counts = packed["cu_seqlens"].diff().tolist() if packed else [1] * len(slots)
            seen["tokens"], seen["labels"] = tokens.split(counts), labels
            seen["ids"] = [None] * len(slots) if ids_keep is None else ids_keep.split(counts)
            return model(tokens, t, ids_keep, labels, **packed)

        out = call(objective, network, images, labels, step=step, slots=slots, **rest)
        for place, slot in enumerate(slots.tolist()):
            digest = hashlib.sha256(seen["tokens"][place].detach().numpy().tobytes())
            if seen["ids"][place] is not None:
                digest.update(seen["ids"][place].long().numpy().tobytes())
            label = None if seen["labels"] is None else int(seen["labels"][place])
            t, loss = float(out["t"][place]), float(out["loss_per_image"][place])
            rows.append({"step": int(step), "slot": slot, "t": t, "loss": loss, "label": label})
            rows[-1]["patches"] = digest.hexdigest()
        return out

    with mock.patch.object(MaskedObjective, "__call__", spy):
        yield
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def kept_values(number: int) -> Iterator[None]:
    """ZeRO 3 keeps parameters of so many values whole: of a small network, too, there are some that it does not."""
    with mock.patch.object(zero_engine, "KEPT_VALUES", number):
        yield


@contextlib.contextmanager
def fast_clock(factor: float) -> Iterator[None]:
    """The training time passes faster here than elsewhere."""
    seconds = metrics.Stopwatch.seconds.fget
    with mock.patch.object(metrics.Stopwatch, "seconds", property(lambda watch: factor * seconds(watch))):
        yield


def _in_step(action: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], Any]:
    """A context that calls `action` in mid-step, before the forward pass, of the step that the argument names."""

    @contextlib.contextmanager
    def context(argument: dict[str, Any]) -> Iterator[None]:
        original = DenoisingStage._micro_batch

        def micro_batch(stage, constants, tensors):
            if int(tensors[-1]) == argument["step"]:
                action(argument)
            return original(stage, constants, tensors)

        with mock.patch.object(DenoisingStage, "_micro_batch", micro_batch):
            yield

    return context


def _bug(argument: dict[str, Any]) -> None:
    raise AttributeError("no such attribute")


def _raise(argument: dict[str, Any]) -> None:
    raise torch.OutOfMemoryError(argument["message"])


signal_in_step = _in_step(lambda argument: os.kill(os.getpid(), argument["signal"]))
bug_in_step = _in_step(_bug)
error_in_step = _in_step(_raise)
sleep_in_step = _in_step(lambda argument: time.sleep(argument["seconds"]))


@contextlib.contextmanager
def factor_in_step(argument: dict[str, Any]) -> Iterator[None]:
    """The loss of one step is multiplied: by 1e30 a scaled one overflows, by NaN it is not a number."""
    call = MaskedObjective.__call__

    def multiplied(objective, *inputs, **rest):
        out = call(objective, *inputs, **rest)
        factor = float(argument["factor"]) if int(rest["step"]) == argument["step"] else 1.0
        return {**out, "loss": out["loss"] * factor}

    with mock.patch.object(MaskedObjective, "__call__", multiplied):
        yield


@contextlib.contextmanager
def no_images_of(slots: list[int]) -> Iterator[None]:
    """A generator makes no images for these places in the global batch."""
    for_training = Generator.for_training

    def broken(generator, labels, **draw):
        images = for_training(generator, labels, **draw)
        return torch.where(torch.isin(draw["slots"], torch.tensor(slots))[:, None, None], torch.nan, images)

    with mock.patch.object(Generator, "for_training", broken):
        yield


@contextlib.contextmanager
def loss_scale(values: dict[str, float]) -> Iterator[None]:
    """Other constants of the loss scale, with which a short run has overflows and grows again."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(LossScale, name, value))
        yield


def _while_saving(path: Path, step: int) -> bool:
    return path.parent.name.endswith(f"-{step:08d}") and not path.name.startswith("model")


@contextlib.contextmanager
def die_in_save(step: int) -> Iterator[None]:
    """SIGKILL when the checkpoint of `step` is half written: one file is whole, the next is not."""
    write = checkpoint._write_tensors

    def die(path, pieces):
        write(path, pieces)
        if _while_saving(path, step):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(checkpoint, "_write_tensors", die):
        yield


@contextlib.contextmanager
def full_disk_in_save(step: int) -> Iterator[None]:
    """The kernel refuses to write more than a kilobyte to a file of the checkpoint of `step`."""
    write, (_, hard) = checkpoint._write_tensors, resource.getrlimit(resource.RLIMIT_FSIZE)

    def refuse(path, pieces):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if _while_saving(path, step) else hard, hard))
        try:
            write(path, pieces)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with mock.patch.object(checkpoint, "_write_tensors", refuse):
        yield


@contextlib.contextmanager
def read_only_in_save(step: int) -> Iterator[None]:
    """The folder of the checkpoints may not be written when the checkpoint of `step` is due."""
    save = checkpoint.save

    def refuse(run, pieces, state, **rest):
        if state["step"] == step:
            _obey_permissions()
            os.chmod(run / checkpoint.CHECKPOINTS_NAME, 0o555)
        return save(run, pieces, state, **rest)

    with mock.patch.object(checkpoint, "save", refuse):
        yield


def _obey_permissions() -> None:
    """As root, give up the capabilities to override the permissions of files."""
    library, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert library.capset(header, sets) == 0


_CAPABILITIES_V3 = 0x20080522
