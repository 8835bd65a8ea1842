"""Forward and backward pass of a micro-batch as one CUDA graph: a single launch instead of a thousand.

An eager step of a small network is bound by the host, which takes 4 to 5 us for each of its launches. A graph is
recorded once per shape and replayed for every micro-batch of that shape; the inputs are copied to where it reads them,
and the gradients are added where it wrote them before. The optimizer's step stays eager: it is few launches, and
between it and the last micro-batch the processes average their gradients.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskdm_fast.train.config import RunConfig

MOST_GRAPHS = 8
"""Graphs that are kept. A run needs one, or two where micro-batches differ in size, for each ratio of its mask."""

_ALIGNMENT = 32  # values: 128 bytes, what a warp reads at once

Work = Callable[[Hashable, Sequence[Tensor]], dict[str, Tensor]]
"""``(constants, tensors) -> 0-d tensors by name``; adds a gradient to what is there."""


class Recorder(Protocol):
    """What `maskdm_fast.ops.streams.Recorder` does."""

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Call `work` a few times; returns what the last call did."""
        ...

    def record(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Record what `work` launches; returns what runs it again."""
        ...


def check_cuda_graph(config: RunConfig, device: torch.device, engine: str) -> None:
    """Refuse what cannot be recorded.

    Args:
        config: of the run.
        device: where it computes.
        engine: its engine, by name, not auto.

    Raises:
        ValueError: the run is on the CPU, its engine is ZeRO, or the shapes of its batches depend on draws.
    """
    mend = "; leave out --cuda-graph"
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a GPU, but the run is on {device.type}{mend}")
    if engine not in ("plain", "ddp"):
        raise ValueError(
            f"cuda_graph goes with the engines plain and ddp, but the engine is {engine}, which moves weights and "
            f"gradients between processes while it computes{mend}, or take --engine plain or ddp"
        )
    stage = config.stage
    if stage.mask.varies or stage.unmasked_share:
        raise ValueError(
            "cuda_graph needs the same number of visible patches in every image, but the mask has a range of ratios or "
            f"some images stay whole (unmasked_share {stage.unmasked_share}){mend}, or give the mask a single ratio"
        )


def flat_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Give each parameter a gradient of zeros that is a part of one tensor, and return that.

    Backward passes add to these gradients as long as nobody sets them to None, so they stay where a graph writes them,
    and one call averages all of them over the processes.

    Args:
        parameters: of one dtype, on one device.

    Returns:
        1-d, in the order of `parameters`; each begins at a multiple of 32 values, and what lies between stays 0.
    """
    parameters = list(parameters)
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    flat = parameters[0].new_zeros(end, requires_grad=False)
    for parameter, start in zip(parameters, starts, strict=True):
        parameter.grad = flat[start : start + parameter.numel()].view(parameter.shape)
    return flat


class MicroBatchGraphs:
    """Runs `work`, each call a replay of the graph of its shape, recorded when it first comes up.

    The numbers are those of calling `work` itself: the gradients that come from trying it out before a recording are
    taken back.

    Args:
        work: forward and backward pass. What may differ from call to call it takes from its tensors; all else is
            recorded as it is: Python numbers, and the addresses of weights, gradients and loss scale, which must be
            changed in place only. It must not wait for the device.
        gradients: the one tensor that `work` adds its gradients to, see `flat_gradients`.
        recorder: of the device.
    """

    def __init__(self, work: Work, gradients: Tensor, recorder: Recorder) -> None:
        self._work, self._gradients, self._recorder = work, gradients, recorder
        self._inputs: dict[Hashable, list[Tensor]] = {}
        self._graphs: OrderedDict[Hashable, tuple[Callable[[], None], dict[str, Tensor]]] = OrderedDict()

    def __call__(self, constants: Hashable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch.

        Args:
            constants: recorded as they are; other constants have a graph of their own.
            tensors: on the device; copied.

        Returns:
            What `work` returned; overwritten by the next call with these constants and shapes.

        Raises:
            RuntimeError: `work` cannot be recorded.
        """
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        inputs = self._inputs.get(shapes)
        if inputs is None:
            inputs = self._inputs[shapes] = [torch.empty_like(tensor) for tensor in tensors]
        for kept, tensor in zip(inputs, tensors, strict=True):
            kept.copy_(tensor)
        key = (constants, shapes)
        if key not in self._graphs:
            self._graphs[key] = self._record(constants, inputs)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        replay, outputs = self._graphs[key]
        replay()
        return outputs

    def _record(self, constants: Hashable, inputs: list[Tensor]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        before = self._gradients.clone()
        found = self._recorder.warm_up(lambda: self._work(constants, inputs))
        # Outside of the memory that graphs share, where the next one would write over it.
        outputs = {name: value.detach().clone() for name, value in found.items()}
        del found
        self._gradients.copy_(before)

        def work() -> None:
            for name, value in self._work(constants, inputs).items():
                outputs[name].copy_(value.detach())

        try:
            return self._recorder.record(work), outputs
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"forward and backward pass cannot be recorded in a CUDA graph: {reason}; leave out --cuda-graph"
            ) from error
