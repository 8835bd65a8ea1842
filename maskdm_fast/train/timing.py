"""Where the time of a training step goes."""

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

from maskdm_fast.ops import backend

PARTS = ("data", "forward", "backward", "optimizer", "communication")
"""What a step is made of. communication lies within the others: see `StepTimer`."""


class StepTimer:
    """Milliseconds of the parts of single steps.

    Only a step before which `arm` was called is measured. In it every part begins and ends with a wait for the device,
    so that the work which a part launched is counted there. Any other step does not wait, and a part of it costs 0.13
    us (Python 3.11 on an EPYC). What runs side by side in other steps (the host ahead of the device) runs one after
    the other in an armed one: the parts say how the work divides, ``images_per_s`` says how fast it is.

    Each part counts all that happens inside it. data, forward, backward and optimizer follow each other, so they add
    up to the step. communication happens inside of them (ddp averages gradients during the backward pass, ZeRO gathers
    weights in the forward pass) and is counted in both: communication tells which share of the others it is, where an
    engine waits for it, and at most that where it runs beside the arithmetic. Replayed from a CUDA graph, forward and
    backward pass are one, and count as forward.

    Args:
        device: where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts = {name: _Part(device) for name in PARTS}
        self._armed = False

    @property
    def armed(self) -> bool:
        """Whether the current step is measured. Engines ask before they measure communication on their own."""
        return self._armed

    def arm(self) -> None:
        """Measure from here on, from zero."""
        for part in self._parts.values():
            part.forget()
        self._armed = True

    def part(self, name: str) -> AbstractContextManager:
        """Context of the part `name` of `PARTS`, entered once per micro-batch or however often it comes; entered again
        inside itself it is counted once."""
        return self._parts[name] if self._armed else _NOTHING

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` that were measured elsewhere."""
        if self._armed:
            self._parts[name].add(seconds)

    def take(self) -> dict[str, float]:
        """``{name}_ms`` of each part that came up since `arm`, in the order of `PARTS`; none if it was not armed.
        Disarms."""
        taken = {f"{name}_ms": part.seconds * 1e3 for name, part in self._parts.items() if part.seconds is not None}
        self._armed = False
        for part in self._parts.values():
            part.forget()
        return taken


_NOTHING = nullcontext()


class _Part:
    """A context that sums the time spent inside of it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._depth, self._start = device, 0, 0.0
        self.seconds: float | None = None

    def forget(self) -> None:
        self.seconds = None

    def add(self, seconds: float) -> None:
        self.seconds = (self.seconds or 0.0) + seconds

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            backend.synchronize(self._device)
            self._start = time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            if kind is None:  # after an error the device may have no answer, or another one
                backend.synchronize(self._device)
            self.add(time.perf_counter() - self._start)
