"""How a network is trained: processes, precision, gradients, optimizer.

A stage computes losses; an engine turns them into updates. Everything that depends on how training is spread over
processes lies behind `Engine`, one network with its optimizer.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from maskdm_fast.optim import AdamWEMA, ApexAdamEMA, LambEMA
from maskdm_fast.optim.ema_optimizer import EMAOptimizer
from maskdm_fast.train.pieces import Pieces, Reader
from maskdm_fast.train.world import World

Precision = Literal["fp32", "bf16", "fp16"]
LayerNorm = Literal["pytorch", "apex"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {
    ("adamw", "maskdm_fast"): AdamWEMA,
    ("adamw", "apex"): ApexAdamEMA,
    ("lamb", "maskdm_fast"): LambEMA,
}
"""Optimizers by name and kernel; the kernels of one optimizer have the same checkpoints."""
Work = Callable[[Hashable, Sequence[Tensor]], dict[str, Tensor]]
"""``(constants, tensors) -> values``: forward and backward pass of a micro-batch; 0-d values by name. Of calls with the
same constants only the tensors and the weights differ."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer's settings, per optimizer step; the learning rate comes with each step. And which of
    `OPTIMIZERS`.

    Without an `ema_decay` no average is kept, and with a beta1 of 0 no first moment: 4 bytes a parameter less each.
    `max_grad_value` comes before `max_grad_norm`, see `AdamWEMA`.
    """

    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float | None
    ema_decay: float | None
    name: Literal["adamw", "lamb"] = "adamw"
    kernel: Literal["maskdm_fast", "apex"] = "maskdm_fast"
    max_grad_value: float | None = None

    def make(self, params: Iterable[nn.Parameter], **options: object) -> EMAOptimizer:
        """The optimizer, with these options of its class besides."""
        return OPTIMIZERS[self.name, self.kernel](
            params,
            lr=0.0,
            betas=self.betas,
            weight_decay=self.weight_decay,
            ema_decay=self.ema_decay,
            **{"max_grad_norm": self.max_grad_norm, "max_grad_value": self.max_grad_value, **options},
        )


@dataclass(frozen=True)
class EngineSettings:
    """How the engine computes.

    Attributes:
        precision: of the forward pass; the trained weights are float32.
        num_micro: micro-batches of a step.
        compiled: parts of the network to compile, each for itself; names in its state dict stay as they are.
        layer_norm: whose kernels the layer norms run on.
        cuda_graph: replay forward and backward passes from CUDA graphs, see `maskdm_fast.train.cuda_graph`.
        offload_idle: a network that rests has its optimizer's state in the memory of the CPU.
    """

    precision: Precision = "fp32"
    num_micro: int = 1
    compiled: tuple[nn.Module, ...] = ()
    layer_norm: LayerNorm = "pytorch"
    cuda_graph: bool = False
    offload_idle: bool = False


Values = Callable[[str], Tensor]
"""Gives the value of a parameter by its name: whole, float32, on the CPU."""


class Engine(Protocol):
    """One network and its optimizer.

    Attributes:
        model: call this for a forward pass.
        device: where its inputs must be.
    """

    model: nn.Module
    device: torch.device

    def micro_batch(self, *, last: bool) -> AbstractContextManager:
        """Context of forward and backward pass of one micro-batch; `last`: of the last one before `step`."""
        ...

    def run(self, work: Work, constants: Hashable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """``work(constants, tensors)``, within `micro_batch`. The values stand until the next call."""
        ...

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass and the loss."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (0-d) to what `step` will use. The losses of one step must sum to the mean over
        this process's share of the global batch; the engine takes the mean over the processes."""
        ...

    def step(self, lr: float) -> dict[str, Tensor]:
        """Update weights and their moving average, forget the gradient.

        Returns:
            ``grad_norm``, the global norm after `max_grad_value` and before clipping; under fp16 also ``loss_scale``
            and ``skipped`` (1 where the gradient overflowed and nothing was changed). 0-d, the same in all processes.
        """
        ...

    def rest(self) -> None:
        """The network is not trained for now: give the memory of its gradients back and, with `offload_idle`, move the
        optimizer's state to the memory of the CPU: moments and average, 12 bytes a parameter or less; pinned, and
        without a wait. Weights stay on the device, and so do ZeRO's float32 copies of them. Nothing is moved on the CPU
        and under zero3-offload, whose state is there."""
        ...

    def wake(self) -> None:
        """Move the state back, ahead of the next `step`, which does so if nobody did."""
        ...

    def averaged(self) -> dict[str, Tensor]:
        """The moving average of the weights as a complete state dict; all processes must ask. Of a network that rests
        it may be on the CPU.

        Raises:
            RuntimeError: none is kept.
        """
        ...

    def pieces(self) -> Pieces:
        """What this process has of everything needed to continue: groups ``model`` (trained weights, float32), ``ema``
        (their average, if one is kept), ``optimizer`` and, under fp16, ``loss_scale``. Over all processes the pieces
        are complete, and none is there twice."""
        ...

    def load(self, reader: Reader) -> None:
        """Continue from the pieces of any engine and number of processes; a network that rests goes on resting.

        Raises:
            ValueError: a moment or the average that the optimizer needs was not saved.
        """
        ...

    def close(self) -> None:
        """Give back what the network and its optimizer hold; the engine cannot be used afterwards."""
        ...


def make_engine(
    name: str,
    model: nn.Module,
    optimizer: OptimizerSettings,
    settings: EngineSettings,
    world: World,
    values: Values | None = None,
) -> Engine:
    """The engine of this name: plain, ddp, zero1, zero2, zero3 or zero3-offload.

    Args:
        model: the network, float32, the same in all processes; it becomes the engine's.
        values: of the network's parameters, where it is on the meta device; zero3 then never holds all of them.

    Raises:
        RuntimeError: something is to be compiled, but no compiler works here; apex is asked for, but not NVIDIA's or
            not installed; DeepSpeed is asked for, but not installed.
        ValueError: the engine cannot do what is asked for; apex is asked for on another device than CUDA; gradients are
            to be cut by value under fp16.
    """
    if settings.precision == "fp16" and optimizer.max_grad_value is not None:
        raise ValueError(
            f"max_grad_value is {optimizer.max_grad_value}, which would hide the overflows that the loss scale of fp16 "
            "follows; leave it out, or take --precision bf16"
        )
    if name not in ("plain", "ddp"):
        from maskdm_fast.train.zero_engine import ZeroEngine

        return ZeroEngine(name, model, optimizer, settings, world, values or model.state_dict().__getitem__)
    if values is not None:
        list(made(model, values))
    if settings.cuda_graph:
        from maskdm_fast.train.cuda_graph import GraphEngine

        return GraphEngine(name, model, optimizer, settings, world)
    from maskdm_fast.train.plain_engine import DataParallelEngine, PlainEngine

    return (PlainEngine if name == "plain" else DataParallelEngine)(model, optimizer, settings, world)


def made(model: nn.Module, values: Values, dtype: torch.dtype = torch.float32) -> Iterator[nn.Parameter]:
    """Replace the parameters of a model on the meta device by such with memory on the CPU and their values, one by one
    as they are asked for: each can be moved or divided before the next one is there."""
    for prefix, module in model.named_modules():
        for leaf in [name for name, _ in module.named_parameters(recurse=False)]:
            value = values(f"{prefix}.{leaf}" if prefix else leaf)
            setattr(module, leaf, nn.Parameter(value.to(dtype, copy=True)))
            yield getattr(module, leaf)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Context in which matrix products are computed in `precision`.

    A network may be called in it without autograd, and then with. No casts of weights are kept between calls: versions
    of PyTorch differ in whether one that was made without autograd would take the gradient from the weight.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=False)


def compile_in_place(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Compile each module's forward; equal modules share their code, so blocks compile once, not once each.

    Raises:
        RuntimeError: no compiler works here.
    """
    modules = list(modules)
    if not modules:
        return
    try:
        # A missing compiler would show as an error deep inside the first step.
        torch.compile(lambda x: x.sin() + 1.0)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"torch.compile does not work on {device}: {reason}. Install a C++ compiler (g++; for a GPU also Triton), "
            "or leave out --compile"
        ) from error
    for module in modules:
        module.compile()
