"""What a run tells: metrics on disk, trackers, progress. Of several processes only the main one speaks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.metrics import MetricsLog
from maskdm_fast.train.progress import Progress
from maskdm_fast.train.trackers import open_trackers


class Journal(Protocol):
    """Receives what happens in a run."""

    def advance(self, images: int, seconds: float) -> None:
        """The state after `images` and `seconds` of training."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics."""
        ...

    def score(self, record: dict[str, Any]) -> None:
        """A line of scores."""
        ...

    def image(self, path: Path, images: int, draw: Callable[[Path], None]) -> None:
        """A picture: `draw` writes it to `path`."""
        ...

    def sync(self) -> None:
        """Make everything durable."""
        ...

    def close(self) -> None:
        """The session ends."""
        ...


class RunJournal:
    """Implements `Journal`: metrics.jsonl, the trackers of the configuration, and a progress bar or lines.

    Args:
        config: of the run.
        folder: the run folder.
        title: shown beside the progress.
        step, images: done when this session begins.
        header: first record of the session.
    """

    def __init__(
        self, config: RunConfig, folder: Path, title: str, step: int, images: int, header: dict[str, Any]
    ) -> None:
        trackers = open_trackers(config.output.trackers, folder, title, header["config"], images)
        self._log = MetricsLog(folder, step, header, trackers)
        self._progress = Progress(title, config.stage)

    def advance(self, images: int, seconds: float) -> None:
        self._progress.advance(images, seconds)

    def log(self, record: dict[str, Any]) -> None:
        self._log.write(record)
        self._progress.log(record)

    def score(self, record: dict[str, Any]) -> None:
        self._log.write(record, kind="score")
        values = {name: value for name, value in record.items() if isinstance(value, float) and name != "seconds"}
        scores = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.message(f"{record['images']:,} images: {scores}")

    def image(self, path: Path, images: int, draw: Callable[[Path], None]) -> None:
        path.parent.mkdir(exist_ok=True)
        draw(path)
        self._log.image(path, images)
        self._progress.message(f"wrote {path}")

    def sync(self) -> None:
        self._log.sync()

    def close(self) -> None:
        self._progress.close()
        self._log.close()


class SilentJournal:
    """Implements `Journal` for the processes beside the main one."""

    def advance(self, images: int, seconds: float) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        pass

    def score(self, record: dict[str, Any]) -> None:
        pass

    def image(self, path: Path, images: int, draw: Callable[[Path], None]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
