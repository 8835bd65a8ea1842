"""Finds out when a training step hangs, says where, and ends the process, so that the others can end too."""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO

STALLED_EXIT_CODE = 75
"""Exit code of a process that its watchdog ended: EX_TEMPFAIL of sysexits.h, for the same command goes on from the
newest checkpoint."""

_CHECKS = 20
_LATE_SECONDS = 1.0
_WRITE_SECONDS = 5.0


class _Beat(NamedTuple):
    step: int
    phase: str
    only_reports: bool


class Watchdog:
    """Watches the thread that made it, from a thread of its own.

    A loop calls `beat` once per step or more often. When no beat has come for `stall_seconds`, one report on stderr
    names rank, host, process, step, phase and the stack of the watched thread. When none has come for twice as long, a
    last report shows the stacks of all threads and the process ends at once with `STALLED_EXIT_CODE`. Nothing is saved;
    its connections close, which tells the processes that wait for it. All ranks of a stalled step report: the one
    whose stack does not wait for another is to blame.

    The limit is the same for every step. The first one includes what is done only once, such as compiling; choose a
    limit above that. Until the first beat and inside `paused` there are reports, but the process goes on.

    A process that was stopped (SIGSTOP, a frozen container) is not taken for stalled when it goes on. The watched
    thread may hang in C code as long as that lets other Python threads run, as PyTorch does while it waits.

    Args:
        stall_seconds: the limit, kept to a twentieth; more than 0.
        rank: the number of this process, for the reports.
        world_size: how many processes train together.
        file: where to report; None: ``sys.stderr``.
    """

    def __init__(self, stall_seconds: float, *, rank: int = 0, world_size: int = 1, file: TextIO | None = None) -> None:
        self._limit, self._file = stall_seconds, file
        self._who = f"rank {rank} of {world_size} ({socket.gethostname()}, pid {os.getpid()})"
        self._watched = threading.get_ident()
        self._last = _Beat(0, "start", only_reports=True)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str = "train") -> None:
        """A sign of life at the begin of a phase of step number `step`; the clock starts again."""
        self._last = _Beat(step, phase, only_reports=False)

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Around what may take long without being wrong (checkpoint, preview, score): no process ends inside. The
        clock starts again before and after it."""
        before = self._last
        self._last = _Beat(before.step, phase, only_reports=True)
        try:
            yield
        finally:
            self._last = _Beat(*before)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        tick = min(self._limit / _CHECKS, threading.TIMEOUT_MAX)
        seen, waited, reported, before = self._last, 0.0, False, time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            # Much later than asked for: nothing of this process ran, so what it waits for may not be late at all.
            passed, before = min(now - before, tick + _LATE_SECONDS), now
            if self._last is not seen:
                seen, waited, reported = self._last, 0.0, False
                continue
            waited += passed
            if waited >= 2 * self._limit and not seen.only_reports:
                self._end(seen, waited)
            if waited >= self._limit and not reported:
                reported = True
                after = "the run goes on" if seen.only_reports else f"the process ends at {2 * self._limit:g} s"
                self._say(
                    f"{self._describe(seen, waited)}; {after} (--stall-seconds {self._limit:g}). It is here, "
                    f"innermost call last:\n{_stack(self._watched)}"
                )

    def _describe(self, beat: _Beat, waited: float) -> str:
        return f"watchdog of {self._who}: step {beat.step} ({beat.phase}) has taken {waited:.1f} s"

    def _end(self, beat: _Beat, waited: float) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = "".join(
            f"Thread {names.get(ident, ident)}{' (watched)' * (ident == self._watched)}:\n{_stack(ident)}"
            for ident in sys._current_frames()
            if ident != threading.get_ident()
        )
        self._say(
            f"{self._describe(beat, waited)}; the process ends now, with exit code {STALLED_EXIT_CODE}. The same "
            f"command goes on from the newest checkpoint. Stacks, innermost call last:\n{stacks}"
        )
        os._exit(STALLED_EXIT_CODE)

    def _say(self, text: str) -> None:
        """From a thread that may be left behind: whoever hangs in a full pipe or holds the lock of stderr must not keep
        the process alive."""

        def write() -> None:
            file = self._file or sys.stderr
            # On a terminal the progress bar stands in the line.
            begin = "\n" if file.isatty() else ""
            print(f"{begin}maskdm-fast: {text}", end="", file=file, flush=True)

        writer = threading.Thread(target=write, name="watchdog report", daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)


def _stack(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    return "  it has ended\n" if frame is None else "".join(traceback.format_stack(frame))
