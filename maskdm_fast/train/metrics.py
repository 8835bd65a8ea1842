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

METRICS_NAME = "metrics.jsonl"


class TrainingDivergedError(RuntimeError):
    """A loss or gradient norm was NaN or infinite."""

    def __init__(self, name: str, step: int, advice: str = "") -> None:
        super().__init__(f"{name} became NaN or infinite at step {step}" + (f". {advice}" if advice else ""))
        self.name, self.step = name, step


class Meter:
    """Running means of per-step values, kept on the device until they are asked for.

    Nothing here waits for the device but `check`, `means` and `state_dict`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._bad: dict[str, Tensor] = {}
        self._count = 0

    def update(self, values: dict[str, Tensor], step: int) -> None:
        """Add the values (0-d tensors) of step number `step`, counted from 1."""
        for name, value in values.items():
            value = value.detach().to(torch.float64)
            if name not in self._bad:
                self._bad[name] = torch.full((), -1, dtype=torch.int64, device=self._device)
            first_bad = (self._bad[name] < 0) & ~torch.isfinite(value)
            self._bad[name] = torch.where(first_bad, step, self._bad[name])
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def check(self) -> None:
        """Wait for the device; raise TrainingDivergedError if any value so far was not finite."""
        steps = {name: int(step) for name, step in self._bad.items()}
        bad = [(step, name) for name, step in steps.items() if step >= 0]
        if bad:
            step, name = min(bad)
            raise TrainingDivergedError(name, step)

    def means(self) -> dict[str, float]:
        """Means since the last call, and start again."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The unfinished sums, so that a resumed run logs the same means as one that was never stopped."""
        return {"count": self._count, "sums": {name: float(total) for name, total in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=self._device) for name, total in state["sums"].items()
        }


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
