"""The loss curve on disk, running means that do not wait for the device, and a description of the machine."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import maskdm_fast
from maskdm_fast.ops import backend
from maskdm_fast.train.trackers import Tracker
from maskdm_fast.train.world import World

METRICS_NAME = "metrics.jsonl"
Value = Tensor | tuple[Tensor, Tensor]
"""0-d tensors: a value, or a sum and its weight."""
Values = dict[str, Value]
"""What a step has to log, on the device; pairs where steps count differently."""


class TrainingDivergedError(RuntimeError):
    """A loss or gradient norm was NaN or infinite."""

    def __init__(self, name: str, step: int, advice: str = "") -> None:
        super().__init__(f"{name} became NaN or infinite at step {step}" + (f". {advice}" if advice else ""))
        self.name, self.step = name, step


class Meter:
    """Running means of per-step values over the processes, kept on the device until they are asked for.

        mean = sum of the values / number of the steps that had them;  of pairs:  sum of the sums / sum of the weights

    Nothing here waits for the device but `check`, `means` and `state_dict`, which all processes must call together.
    Steps that a loss scale skipped (``skipped`` is 1) count in no mean, and their values need not be finite; the scale
    itself (``loss_scale``) is told as it was last.

    Args:
        world: the processes; a value is the mean of theirs.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows: dict[tuple[str, ...], _Rows] = {}
        self._skips: Tensor | None = None
        self._loss_scale: Tensor | None = None
        self._had: set[str] = set()
        self._saved: dict[str, list[float]] = {}
        self._saved_skips = 0.0
        self._skipped_before = 0

    def update(self, values: Values, step: int) -> None:
        """Add the values of step number `step`, counted from 1: 0-d tensors, or pairs of them (sum, weight). Steps may
        have different ones, the same in all processes."""
        values = dict(values)
        skipped, self._loss_scale = values.pop("skipped", None), values.pop("loss_scale", self._loss_scale)
        names = tuple(values)
        self._had |= {name for name, value in values.items() if not isinstance(value, tuple)}
        if names not in self._rows:
            self._rows[names] = _Rows.empty(len(names), _first(next(iter(values.values()))).device)
        if skipped is not None:
            self._skips = skipped if self._skips is None else self._skips + skipped
        self._rows[names] = self._rows[names].plus(list(values.values()), skipped, step)

    def check(self) -> None:
        """Wait for the device; raise TrainingDivergedError if any value so far was not finite."""
        if not self._rows:
            return
        never = torch.iinfo(torch.int64).max
        firsts = torch.cat([torch.where(rows.bad < 0, never, rows.bad) for rows in self._rows.values()])
        names = [name for group in self._rows for name in group]
        bad = [found for found in zip(self._world.smallest(firsts).tolist(), names, strict=True) if found[0] < never]
        if bad:
            step, name = min(bad, key=lambda found: found[0])  # of several names the first, which is the loss
            raise TrainingDivergedError(name, step)

    def means(self) -> dict[str, float]:
        """Means since the last call, and start again, of what had a weight at all; NaN where all steps were skipped.
        Under a loss scale also ``skipped_steps`` since the run began."""
        totals, skips = self._totals()
        counted = {name: pair for name, pair in totals.items() if pair[1] or name in self._had}
        means = {name: total / weight if weight else math.nan for name, (total, weight) in counted.items()}
        if skips is not None:
            self._skipped_before += int(skips)
            means["skipped_steps"] = self._skipped_before
            self._skips = torch.zeros_like(self._skips)
        if self._loss_scale is not None:
            means["loss_scale"] = float(self._loss_scale)
        self._rows = {names: rows.emptied() for names, rows in self._rows.items()}
        self._had, self._saved, self._saved_skips = set(), {}, 0.0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The unfinished sums, so that a resumed run logs the same means as one that was never stopped."""
        totals, skips = self._totals()
        counts = {"skips": skips or 0.0, "skipped_steps": self._skipped_before}
        scale = None if self._loss_scale is None else float(self._loss_scale)
        return {"sums": totals, "had": sorted(self._had), "loss_scale": scale, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; before the first `update`."""
        sums = state["sums"]
        if "count" in state:  # an older version had one weight for all
            weight = state["count"] - sums.get("skipped", 0.0)
            state = {**state, "skips": sums.get("skipped", 0.0)}
            sums = {name: [total, weight] for name, total in sums.items() if name != "skipped"}
        self._saved, self._saved_skips = {name: list(pair) for name, pair in sums.items()}, state["skips"]
        self._had, self._skipped_before = set(state.get("had", sums)), state.get("skipped_steps", 0)
        if state.get("loss_scale") is not None:
            self._loss_scale = torch.tensor(state["loss_scale"])

    def _totals(self) -> tuple[dict[str, list[float]], float | None]:
        """[sum, weight] by name, and the skipped steps, None without a loss scale. Means over the processes, but of
        pairs the sums, for each process adds its own weight: so the state is the same for any number of them."""
        totals = {name: list(pair) for name, pair in self._saved.items()}
        parts = [rows.sums.flatten() for rows in self._rows.values()]
        if self._skips is not None:
            parts.append(self._skips.double()[None])
        if not parts:
            return totals, None
        found = self._world.mean(torch.cat(parts)).tolist()
        for names in self._rows:
            for place, name in enumerate(names):
                pair = totals.setdefault(name, [0.0, 0.0])
                processes = 1 if name in self._had else self._world.world_size
                pair[0] += processes * found[place]
                pair[1] += processes * found[len(names) + place]
            found = found[2 * len(names) :]
        return totals, None if self._skips is None else found[0] + self._saved_skips


@dataclass(frozen=True)
class _Rows:
    """What steps with the same names add up to.

    Attributes:
        sums: float64 ``[2, names]``: of the values, and of their weights.
        bad: int64 ``[names]``, the first step with a value that is not finite, or -1.
    """

    sums: Tensor
    bad: Tensor

    @classmethod
    def empty(cls, num_names: int, device: torch.device) -> "_Rows":
        return cls(
            torch.zeros(2, num_names, dtype=torch.float64, device=device),
            torch.full((num_names,), -1, dtype=torch.int64, device=device),
        )

    def emptied(self) -> "_Rows":
        return _Rows(torch.zeros_like(self.sums), self.bad)

    def plus(self, values: list[Value], skipped: Tensor | None, step: int) -> "_Rows":
        one = torch.ones((), dtype=torch.float64, device=self.sums.device)
        pairs = [value if isinstance(value, tuple) else (value, one) for value in values]
        row = torch.stack([item.detach().to(torch.float64) for side in zip(*pairs, strict=True) for item in side])
        row = row.view_as(self.sums)
        bad = ~torch.isfinite(row[0])
        if skipped is not None:
            bad &= skipped == 0
            row = torch.where(skipped > 0, 0.0, row)
        return _Rows(self.sums + row, torch.where((self.bad < 0) & bad, step, self.bad))


def _first(value: Value) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


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
