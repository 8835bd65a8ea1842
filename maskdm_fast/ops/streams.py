"""Work that a CUDA device does beside or instead of what the host launches: a second stream, and recorded graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Runs before a recording, as PyTorch advises: libraries set themselves up and kernels are tuned and compiled in them,
which cannot be recorded."""


def mark(device: torch.device) -> Callable[[], None]:
    """Returns what waits, on the host, until a CUDA device has done all that the stream that is current now was given
    so far."""
    reached = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others
    reached.record(torch.cuda.current_stream(device))
    return reached.synchronize


class SideStream:
    """A stream on which a CUDA device works beside the one on which it computes.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def queue(self, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Call `work` with this stream as the current one; what it launches runs here, after what is queued already.

        Returns:
            What hands over the tensors that `work` made: to be called once, where the stream that will use them is
            current. That stream waits for them, the host does not.
        """
        with torch.cuda.stream(self._stream):
            tensors = work()
            made = self._stream.record_event()

        def take() -> list[Tensor]:
            user = torch.cuda.current_stream(self._stream.device)
            user.wait_event(made)
            for tensor in tensors:
                # Else their memory, which belongs to this stream, could be handed out here while it is still in use.
                tensor.record_stream(user)
            return tensors

        return take

    def mark(self) -> Callable[[], None]:
        """`mark` of this device."""
        return mark(self._stream.device)


class Recorder:
    """Records work into CUDA graphs that share their memory, so they must not run at the same time.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Call `work` `WARM_UP` times on a stream of its own, as PyTorch asks for before a recording; returns what the
        last call did."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Record what `work` launches, without running it; waits for the device.

        Returns:
            What runs it, on the stream that is current then. It reads and writes the memory that `work` had: whatever
            comes from outside must stay where it is, and what it makes is overwritten by the next graph that runs.
        """
        # Else autocast's casts of the weights, kept from before, would not be part of the graph.
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: one of them copies the next batch to the device.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
