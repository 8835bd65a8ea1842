"""What a person sees while a run goes on: a bar on a terminal, a line per log interval elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from maskdm_fast.train.extras import require
from maskdm_fast.train.stage_config import StageConfig

_SHOWN_SHARE = 0.1
_BAR = "{desc} {percentage:3.0f}%|{bar}|{postfix}"


class Progress:
    """Shows the state of one run.

    Args:
        title: name of the run.
        stage: for its stopping rules.
        file: where to write; by default stderr.
    """

    def __init__(self, title: str, stage: StageConfig, file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._title, self._stage = title, stage
        self._bar = None
        if self._file.isatty():
            self._bar = require("tqdm").tqdm(desc=title, total=100, bar_format=_BAR, file=self._file)

    def advance(self, images: int, seconds: float) -> None:
        """Move the bar to the state after `images` and `seconds` of training."""
        if self._bar is not None:
            self._bar.update(self._percent(images, seconds) - self._bar.n)

    def log(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        images, seconds = record["images"], record["seconds"]
        percent = self._percent(images, seconds)
        left = seconds * (100.0 / percent - 1.0)
        # On a device whose peak nobody stated there is no utilisation to show, but what it does can be compared.
        work = f"{record['mfu']:.1%} MFU" if "mfu" in record else f"{record['model_tflops']:.3g} TFLOP/s"
        text = ", ".join(
            [
                f"{images:,} images",
                f"{record['images_per_s']:,.0f} images/s",
                work,
                *_delays(record),
                f"loss {record['loss']:.4f}",
                f"{format_seconds(left)} left",
            ]
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self.message(f"{self._title} {percent:3.0f}%: {text}")

    def message(self, text: str) -> None:
        """Show one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _percent(self, images: int, seconds: float) -> float:
        """Progress towards the stopping rule that is met first."""
        shares = [
            done / limit
            for done, limit in ((images, self._stage.num_images), (seconds, self._stage.max_seconds))
            if limit
        ]
        return min(100.0, 100.0 * max(shares))


def _delays(record: dict[str, Any]) -> list[str]:
    """What takes much time besides the arithmetic, by the split of a step."""
    step = sum(record.get(f"{name}_ms", 0.0) for name in ("data", "forward", "backward", "optimizer"))
    delays = {name: record.get(f"{name}_ms", 0.0) for name in ("data", "communication")}
    return [f"{name} {ms / step:.0%} of a step" for name, ms in delays.items() if ms > _SHOWN_SHARE * step]


@contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function ``progress(done, total)`` that draws a bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with require("tqdm").tqdm(desc=title, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def format_seconds(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
