"""What a person sees while a run goes on: a bar on a terminal, a line per log interval elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from maskdm_fast.train.config import DenoisingConfig
from maskdm_fast.train.extras import require

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} images{postfix}"


class Progress:
    """Shows the state of one run.

    Args:
        title: name of the run.
        limits: the stage, for its stopping rules.
        images: images done when it begins.
        file: where to write.
    """

    def __init__(self, title: str, limits: DenoisingConfig, images: int, file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._title, self._limits = title, limits
        self._bar = None
        if self._file.isatty():
            self._bar = require("tqdm").tqdm(
                desc=title, total=limits.num_images, initial=images, unit_scale=True, bar_format=_BAR, file=self._file
            )

    def advance(self, images: int) -> None:
        """Move on by this many images."""
        if self._bar is not None:
            self._bar.update(images)

    def log(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        text = f"loss {record['loss']:.4f}, {record['images_per_s']:,.0f} images/s, {self._left(record)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            done, total = record["images"], self._limits.num_images
            self.message(f"{self._title}: {done:,}/{total:,} images ({100 * done / total:.0f} %), {text}")

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

    def _left(self, record: dict[str, Any]) -> str:
        seconds = (self._limits.num_images - record["images"]) / record["images_per_s"]
        if self._limits.max_seconds is not None:
            seconds = min(seconds, self._limits.max_seconds - record["seconds"])
        return format_seconds(max(0.0, seconds))


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
