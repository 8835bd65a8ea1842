"""The loss curve on disk, running means that do not wait for the device, and a description of the machine."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import maskdm_fast
from maskdm_fast.ops import backend
from maskdm_fast.train.trackers import Tracker
from maskdm_fast.train.world import World

METRICS_NAME = "metrics.jsonl"


class TrainingDivergedError(RuntimeError):
    """A loss or gradient norm was NaN or infinite."""

    def __init__(self, name: str, step: int, advice: str = "") -> None:
        super().__init__(f"{name} became NaN or infinite at step {step}" + (f". {advice}" if advice else ""))
        self.name, self.step = name, step


class Meter:
    """Running means of per-step values over the processes, kept on the device until they are asked for.

    Nothing here waits for the device but `check`, `means` and `state_dict`, which all processes must call together.
    Steps that a loss scale skipped (``skipped`` is 1) count in no mean, and their values need not be finite; the scale
    itself (``loss_scale``) is told as it was last.

    Args:
        world: the processes; a value is the mean of theirs.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._names: list[str] = []
        self._sums = self._skips = torch.empty(0)
        self._bad = torch.empty(0, dtype=torch.int64)
        self._loss_scale: Tensor | None = None
        self._saved: dict[str, float] = {}
        self._count = self._skipped_before = 0

    def update(self, values: dict[str, Tensor], step: int) -> None:
        """Add the values (0-d tensors, the same names every time) of step number `step`, counted from 1."""
        values = {name: value.detach() for name, value in values.items()}
        skipped, self._loss_scale = values.pop("skipped", None), values.pop("loss_scale", None)
        row = torch.stack([value.to(torch.float64) for value in values.values()])
        if not self._names:
            self._names = [*values, *([] if skipped is None else ["skipped"])]
            self._bad = torch.full_like(row, -1, dtype=torch.int64)
            self._sums = torch.tensor([self._saved.get(name, 0.0) for name in values], dtype=row.dtype).to(row.device)
            self._skips = torch.full_like(row[0], self._saved.get("skipped", 0.0))
        bad = ~torch.isfinite(row)
        if skipped is not None:
            bad &= skipped == 0
            row = torch.where(skipped > 0, 0.0, row)
            self._skips = self._skips + skipped
        self._bad = torch.where((self._bad < 0) & bad, step, self._bad)
        self._sums = self._sums + row
        self._count += 1

    def check(self) -> None:
        """Wait for the device; raise TrainingDivergedError if any value so far was not finite."""
        never = torch.iinfo(torch.int64).max
        steps = self._world.smallest(torch.where(self._bad < 0, never, self._bad)).tolist()
        bad = [(step, name) for step, name in zip(steps, self._names, strict=False) if step < never]
        if bad:
            step, name = min(bad, key=lambda found: found[0])  # of several names the first, which is the loss
            raise TrainingDivergedError(name, step)

    def means(self) -> dict[str, float]:
        """Means since the last call, and start again; under a loss scale also ``skipped_steps`` since the run began."""
        sums = self._totals()
        skipped = sums.pop("skipped", None)
        counted = self._count - (skipped or 0.0)
        means = {name: total / counted if counted else math.nan for name, total in sums.items()}
        if skipped is not None:
            self._skipped_before += int(skipped)
            means["skipped_steps"] = self._skipped_before
            self._skips = torch.zeros_like(self._skips)
        if self._loss_scale is not None:
            means["loss_scale"] = float(self._loss_scale)
        self._sums, self._count, self._saved = torch.zeros_like(self._sums), 0, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """The unfinished sums, so that a resumed run logs the same means as one that was never stopped."""
        return {"count": self._count, "sums": self._totals(), "skipped_steps": self._skipped_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; before the first `update`."""
        self._count, self._saved = state["count"], dict(state["sums"])
        self._skipped_before = state.get("skipped_steps", 0)

    def _totals(self) -> dict[str, float]:
        if not self._names:
            return dict(self._saved)
        held = [*self._sums.cpu(), *([self._skips.cpu()] if "skipped" in self._names else [])]
        return dict(zip(self._names, self._world.mean(torch.stack(held)).tolist(), strict=True))


class Stopwatch:
    """Seconds of training so far, over all resumes; stands still inside `paused`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._start: float | None = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._seconds + (0.0 if self._start is None else time.monotonic() - self._start)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._seconds, self._start = self.seconds, None
        try:
            yield
        finally:
            self._start = time.monotonic()


class MetricsLog:
    """``metrics.jsonl``: a header per session (``"kind": "header"``), then one line per log interval (``"kind":
    "log"``) and per score (``"kind": "score"``). Trackers get the same lines.

    Opening it at a step drops every line written after that step, and a last line that a crash tore, so that the
    curve of a resumed run has neither gaps nor duplicates.
    """

    def __init__(self, folder: Path, step: int, header: dict[str, Any], trackers: Sequence[Tracker] = ()) -> None:
        self.path = folder / METRICS_NAME
        kept = [record for record in read_metrics(folder) if _belongs(record, step)]
        kept.append({"kind": "header", "step": step, **header})
        fresh = self.path.with_name(f".{METRICS_NAME}.tmp")
        with open(fresh, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._trackers = trackers

    def write(self, record: dict[str, Any], kind: Literal["log", "score"] = "log") -> None:
        """Append one line."""
        record = {"kind": kind, **record}
        self._file.write(_line(record))
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(record)

    def image(self, path: Path, images: int) -> None:
        """Show the trackers a PNG file that was drawn after `images` images."""
        for tracker in self._trackers:
            tracker.image(path, images)

    def sync(self) -> None:
        """Make all lines durable; called before a checkpoint, which must never be ahead of the curve."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """All whole records of a run folder's ``metrics.jsonl``, oldest first; none if there is no such file.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    path = Path(folder) / METRICS_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from None
    return records


def _belongs(record: dict[str, Any], step: int) -> bool:
    # A header opens its session, so one at `step` itself opened a session that left nothing behind.
    return record["step"] < step or (record["step"] == step and record["kind"] != "header")


def _line(record: dict[str, Any]) -> str:
    # json would write NaN, which is not JSON.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean) + "\n"


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` if tracked files differ; None outside a
    checkout."""
    root = Path(maskdm_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None


def package_versions() -> dict[str, str | None]:
    """Versions of this package, Python and the packages that matter to results; None where one is not installed."""
    return {
        "maskdm_fast": maskdm_fast.__version__,
        "python": platform.python_version(),
        **backend.package_versions(),
    }


def machine() -> dict[str, Any]:
    """The machine in words and numbers."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"system": platform.platform(), "cpu": cpu, "devices": backend.devices()}
