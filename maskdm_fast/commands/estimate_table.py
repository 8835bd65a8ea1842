"""The estimate of a train step as a table for people and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskdm_fast.train.estimate import Estimate, amount
from maskdm_fast.train.hardware import BANDWIDTH_SHARE, LAUNCH_SECONDS, PRODUCT_SHARE, Hardware
from maskdm_fast.train.memory import gigabytes
from maskdm_fast.train.roofline import Roofline, Time, launches_of_parts

_LETTERS = {"compute": "C", "memory": "M", "launches": "L"}
_COLUMNS = (("part", "<22"), ("calls", ">6"), ("GFLOP", ">10"), ("MB", ">10"), ("FLOP/B", ">8"), ("launches", ">9"))


@dataclass(frozen=True)
class StageEstimate:
    """One stage on some machines.

    Attributes:
        name: of the stage.
        estimate: what it is.
        precision: of its products: bf16, tf32 or fp32.
        machines, times: by name.
    """

    name: str
    estimate: Estimate
    precision: str
    machines: Mapping[str, Hardware]
    times: Mapping[str, Roofline]

    def to_json(self) -> dict[str, Any]:
        """Numbers in FLOPs, bytes and seconds."""
        found, launches = self.estimate, launches_of_parts(self.estimate.parts, self.estimate.launches)
        return {
            "stage": self.name,
            "visible": found.visible,
            "patches": found.patches,
            "batch_size": found.batch_size,
            "micro_batches": found.num_micro,
            "precision": self.precision,
            "parameters": found.parameters,
            "memory_bytes": found.memory.total,
            "flops": found.work.flops,
            "model_flops": found.work.model_flops,
            "bytes": found.work.bytes,
            "launches": sum(found.launches.values()),
            "parts": [
                {
                    "part": part.name,
                    "op": part.op,
                    "calls": part.calls,
                    "flops": part.work.flops,
                    "bytes": part.work.bytes,
                    "intensity": part.work.intensity,
                    "launches": launches[part.name],
                    "seconds": {name: time.parts[part.name].seconds for name, time in self.times.items()},
                    "bound": {name: time.parts[part.name].bound for name, time in self.times.items()},
                }
                for part in found.parts
            ],
            "hardware": {
                name: {
                    "title": self.machines[name].title,
                    "peak_flops": self.machines[name].peaks[self.precision],
                    "bandwidth": self.machines[name].bandwidth,
                    "source": self.machines[name].source,
                    "step_seconds": time.step.seconds,
                    "device_seconds": time.device_seconds,
                    "images_per_s": found.batch_size / time.step.seconds,
                    "bound": time.step.bound,
                    "mfu": time.mfu,
                }
                for name, time in self.times.items()
            },
        }

    def __str__(self) -> str:
        found, launches = self.estimate, launches_of_parts(self.estimate.parts, self.estimate.launches)
        micro = f" in {found.num_micro} micro-batches" if found.num_micro > 1 else ""
        lines = [
            f"{self.name}: {found.visible:.4g} of {found.patches} patches visible, {found.batch_size} images a step"
            f"{micro}, {self.precision}, {amount(found.parameters)}parameters, "
            f"{gigabytes(found.memory.total)} of memory. An estimate:",
            "".join(f"{title:{form}}" for title, form in _COLUMNS) + "".join(f"{name:>11}" for name in self.times),
        ]
        for part in found.parts:
            work = part.work
            cells = (part.name, part.calls, work.flops / 1e9, work.bytes / 1e6, work.intensity, launches[part.name])
            lines.append(_row(cells) + "".join(f"{_time(time.parts[part.name]):>11}" for time in self.times.values()))
        work = found.work
        total = ("step, ms", "", work.flops / 1e9, work.bytes / 1e6, work.intensity, sum(found.launches.values()))
        lines.append(_row(total) + "".join(f"{_time(time.step):>11}" for time in self.times.values()))
        images = found.batch_size
        rows = {
            "images/s": [f"{images / time.step.seconds:,.0f}" for time in self.times.values()],
            "MFU": [_share(time.mfu) for time in self.times.values()],
            "device alone, ms": [_milliseconds(time.device_seconds) for time in self.times.values()],
            "images/s, device alone": [f"{images / time.device_seconds:,.0f}" for time in self.times.values()],
        }
        lines += [f"{title:<65}" + "".join(f"{cell:>11}" for cell in cells) for title, cells in rows.items()]
        return "\n".join(lines)


def legend(stages: Sequence[StageEstimate]) -> str:
    """What the tables mean, what they assume, and where the rates are from."""
    precision, lines = stages[0].precision, []
    for name, machine in stages[0].machines.items():
        rates = f"{amount(machine.peaks[precision])}FLOP/s {precision}, {amount(machine.bandwidth)}B/s"
        lines.append(f"  {name:<6}{machine.title}: {rates}. {machine.source}")
    return "\n".join(
        [
            "ms by machine, and what bounds it: C compute, M memory, L launches. FLOPs of products (multiply-add: 2),",
            "bytes of every input read and every output written once. On a GPU a step takes as long as its parts or",
            f"its launches, whichever is more; assumed are {PRODUCT_SHARE:.0%} of the peak in products, "
            f"{BANDWIDTH_SHARE:.0%} of the bandwidth, {LAUNCH_SECONDS * 1e6:g} us a launch.",
            "device alone: as if the step were captured in a CUDA graph. On a CPU times and launches add up.",
            *lines,
        ]
    )


def _row(cells: tuple[Any, ...]) -> str:
    texts = [cell if isinstance(cell, str) else _number(cell) for cell in cells]
    return "".join(f"{text:{form}}" for text, (_, form) in zip(texts, _COLUMNS, strict=True))


def _number(value: float) -> str:
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _time(time: Time) -> str:
    return f"{_milliseconds(time.seconds)} {_LETTERS[time.bound]}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _share(mfu: float | None) -> str:
    return "-" if mfu is None else f"{mfu:.1%}"
