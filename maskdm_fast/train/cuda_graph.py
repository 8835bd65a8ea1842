"""Forward and backward pass of a micro-batch as one CUDA graph: a single launch instead of a thousand.

A graph is recorded once per shape and replayed for every micro-batch of that shape: its inputs are copied to where it
reads them, and it adds its gradients to those that are there. The optimizer's step stays eager, for it is few launches,
and before it the processes average their gradients.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskdm_fast.ops import streams
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings, Work
from maskdm_fast.train.plain_engine import DataParallelEngine, PlainEngine
from maskdm_fast.train.world import World

MOST_GRAPHS = 8
"""Graphs that are kept. A run needs one, or two where micro-batches differ in size, for each ratio of its mask."""

_ALIGNMENT = 32  # values: 128 bytes, what a warp reads at once


class Recorder(Protocol):
    """What `maskdm_fast.ops.streams.Recorder` does."""

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Call `work` a few times; returns what the last call did."""
        ...

    def record(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Record what `work` launches; returns what runs it again."""
        ...


def flat_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Give each parameter a gradient of zeros that is a part of one tensor, and return that.

    Backward passes add to these gradients as long as nobody sets them to None, so they stay where a graph writes them,
    and one call averages all of them over the processes. A parameter that takes no part in the loss has a gradient of
    zeros, so that weight decay reaches it.

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
    """Runs work by replaying the graph of its shape, which is recorded when it first comes up.

    The numbers are those of calling the work itself: the gradients that come from trying it out before a recording are
    taken back.

    Args:
        gradients: the one tensor that all work adds its gradients to, see `flat_gradients`.
        recorder: of the device.
    """

    def __init__(self, gradients: Tensor, recorder: Recorder) -> None:
        self._gradients, self._recorder = gradients, recorder
        self._inputs: dict[Hashable, list[Tensor]] = {}
        self._graphs: OrderedDict[Hashable, tuple[Callable[[], None], dict[str, Tensor]]] = OrderedDict()

    def run(self, work: Work, constants: Hashable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch.

        Args:
            work: forward and backward pass. What may differ from call to call it takes from its tensors; all else is
                recorded as it is: Python numbers, and the addresses of weights, gradients and loss scale, which must be
                changed in place only. It must not wait for the device.
            constants: recorded as they are; work with other constants has a graph of its own.
            tensors: on the device; copied.

        Returns:
            What `work` returned; overwritten by the next call with the same work, constants and shapes.

        Raises:
            RuntimeError: `work` cannot be recorded.
        """
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        inputs = self._inputs.get(shapes)
        if inputs is None:
            inputs = self._inputs[shapes] = [torch.empty_like(tensor) for tensor in tensors]
        for kept, tensor in zip(inputs, tensors, strict=True):
            kept.copy_(tensor)
        key = (work, constants, shapes)
        if key not in self._graphs:
            self._graphs[key] = self._record(lambda: work(constants, inputs))
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        replay, outputs = self._graphs[key]
        replay()
        return outputs

    def _record(self, call: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        before = self._gradients.clone()
        found = self._recorder.warm_up(call)
        # Outside of the memory that graphs share, where the next one would write over it.
        outputs = {name: value.detach().clone() for name, value in found.items()}
        del found
        self._gradients.copy_(before)

        def keeping_outputs() -> None:
            for name, value in call().items():
                outputs[name].copy_(value.detach())

        try:
            return self._recorder.record(keeping_outputs), outputs
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"forward and backward pass cannot be recorded in a CUDA graph: {reason}; leave out --cuda-graph"
            ) from error


class GraphEngine(PlainEngine):
    """One process or several, each with the whole network and a share of every batch, whose forward and backward passes
    are replayed from CUDA graphs. Implements `Engine`.

    The gradients of all micro-batches are added up first and then averaged over the processes in one call: this cannot
    run beside the backward pass as DistributedDataParallel's does, which pays where launches cost more than that.

    Args:
        name: plain or ddp, which says whether there is one process.
        recorder: of the device; None: that of CUDA. Other arguments and errors as for `PlainEngine`.
    """

    def __init__(
        self,
        name: Literal["plain", "ddp"],
        model: nn.Module,
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        recorder: Recorder | None = None,
    ) -> None:
        self._name = name
        super().__init__(model, optimizer, settings, world)
        self._gradients = flat_gradients(self._network.parameters())
        self._graphs = MicroBatchGraphs(self._gradients, recorder or streams.Recorder(self.device))

    def _check(self, world: World) -> None:
        (PlainEngine if self._name == "plain" else DataParallelEngine)._check(self, world)

    def run(self, work: Work, constants: Hashable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        # Where the forward pass ends and the backward pass begins, a replay does not tell.
        with self._world.timer.part("forward"):
            return self._graphs.run(work, constants, tensors)

    def _step(self, lr: float) -> dict[str, Tensor]:
        if self._world.world_size > 1:
            with self._world.timer.part("communication"):
                dist.all_reduce(self._gradients.div_(self._world.world_size))
        return super()._step(lr)

    def _forget_gradients(self) -> None:
        self._gradients.zero_()
