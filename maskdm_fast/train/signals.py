"""Ask a running loop to stop."""

import signal
import threading
from types import FrameType, TracebackType


class StopSignals:
    """Inside this context SIGTERM and SIGINT only set `received`, so that the loop can save and end.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers,
    signals keep their usual effect.

    Attributes:
        received: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
