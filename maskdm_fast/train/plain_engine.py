"""Engines in which every process holds the whole network: one process alone, or several that share the work."""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from maskdm_fast.optim import use_apex_layer_norm
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings, Work, autocast, compile_in_place
from maskdm_fast.train.idle import IdleState
from maskdm_fast.train.loss_scale import LossScale
from maskdm_fast.train.pieces import Pieces, Reader, share_out
from maskdm_fast.train.world import World

_SCALARS = ("step",)  # slots of the optimizer that are one number per parameter


class PlainEngine:
    """One process, one device, no sharding. Implements `Engine`.

    Args:
        model: the network, float32; moved to `world`'s device.
        optimizer: its settings.
        settings: how to compute.
        world: the process.

    Raises:
        RuntimeError, ValueError: as `maskdm_fast.train.engine.make_engine`.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerSettings, settings: EngineSettings, world: World) -> None:
        self._check(world)
        self.device = world.device
        self.model = self._network = model.to(self.device)
        self._world, self._precision = world, settings.precision
        if settings.layer_norm == "apex":
            use_apex_layer_norm(self._network)
        compile_in_place(settings.compiled, self.device)
        self._names = [name for name, _ in self._network.named_parameters()]
        self._loss_scale = LossScale(self.device) if settings.precision == "fp16" else None
        options = {"capturable": True} if self._loss_scale else {}
        self._optimizer = optimizer.make(self._network.parameters(), **options)
        self._averages = optimizer.ema_decay is not None
        self._idle = IdleState(self._optimizer, self.device, settings.offload_idle and self.device.type == "cuda")

    def _check(self, world: World) -> None:
        if world.world_size != 1:
            raise ValueError(f"engine plain is one process, but there are {world.world_size}; use --engine ddp")

    def micro_batch(self, *, last: bool) -> AbstractContextManager:
        return nullcontext()

    def run(self, work: Work, constants: Hashable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return work(constants, tensors)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device, self._precision)

    def backward(self, loss: Tensor) -> None:
        with self._world.timer.part("backward"):
            (loss if self._loss_scale is None else loss * self._loss_scale.scale).backward()

    def step(self, lr: float) -> dict[str, Tensor]:
        with self._world.timer.part("optimizer"):
            self.wake()
            return self._step(lr)

    def _step(self, lr: float) -> dict[str, Tensor]:
        optimizer, values = self._optimizer, {}
        for group in optimizer.param_groups:
            if optimizer.capturable:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self._loss_scale is None:
            optimizer.step()
        else:
            values["loss_scale"] = self._loss_scale.scale.clone()
            optimizer.step(loss_scale=self._loss_scale.scale)
            values["skipped"] = self._loss_scale.update(optimizer.found_inf)
        self._forget_gradients()
        return {"grad_norm": optimizer.grad_norm, **values}

    def _forget_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def rest(self) -> None:
        self._idle.rest()

    def wake(self) -> None:
        self._idle.wake()

    def averaged(self) -> dict[str, Tensor]:
        emas = map(self._idle.held, self._optimizer.ema_parameters())
        return {**self._network.state_dict(), **dict(zip(self._names, emas, strict=True))}

    def pieces(self) -> Pieces:
        self._optimizer.make_state()
        weights = self._network.state_dict()
        ranks = share_out({name: tensor.numel() for name, tensor in weights.items()}, self._world.world_size)
        mine = {name for name, rank in ranks.items() if rank == self._world.rank}
        groups: dict[str, dict[str, Tensor]] = {
            "model": {name: tensor for name, tensor in weights.items() if name in mine},
            "optimizer": {},
        }
        if self._averages:
            groups["ema"] = {name: tensor for name, tensor in self.averaged().items() if name in mine}
        for name, param in self._network.named_parameters():
            if name in mine:
                for slot, value in self._optimizer.state[param].items():
                    # One tensor counts the steps of many parameters; a file wants one each.
                    held = torch.tensor(int(value)) if slot in _SCALARS else self._idle.held(value)
                    if slot != "ema":
                        groups["optimizer"][f"{slot}.{name}"] = held
        if self._loss_scale is not None and self._world.is_main:
            groups["loss_scale"] = self._loss_scale.state_dict()
        return groups

    def load(self, reader: Reader) -> None:
        self._network.load_state_dict({name: reader.tensor("model", name) for name in reader.names("model")})
        index_of = {name: index for index, name in enumerate(self._names)}
        state: dict[int, dict[str, Any]] = {}
        for key in reader.names("optimizer"):
            slot, name = key.split(".", 1)
            value = reader.tensor("optimizer", key)
            state.setdefault(index_of[name], {})[slot] = int(value) if slot in _SCALARS else value
        averages = reader.names("ema") if self._averages else ()
        for index, slots in state.items():
            if self._names[index] in averages:
                slots["ema"] = reader.tensor("ema", self._names[index])
        with self._idle.awake():
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        if self._loss_scale is not None and reader.names("loss_scale"):
            names = reader.names("loss_scale")
            self._loss_scale.load_state_dict({name: reader.tensor("loss_scale", name) for name in names})

    def close(self) -> None:
        pass  # it goes when nobody refers to it


class DataParallelEngine(PlainEngine):
    """Several processes, each with the whole network and a share of every batch; gradients are averaged by PyTorch's
    DistributedDataParallel beside the backward pass. Implements `Engine`.

    Gradients lie in the buckets that are sent. They are made at the first micro-batch, and while the network rests
    their memory is given back: of several networks that are trained in turn, one has gradients.

    Arguments and errors as for `PlainEngine`.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerSettings, settings: EngineSettings, world: World) -> None:
        super().__init__(model, optimizer, settings, world)
        self.model = _Replica(self._network)
        self._buckets = _Buckets(world)
        self._accumulates = settings.num_micro > 1

    def _check(self, world: World) -> None:
        if world.world_size == 1:
            raise ValueError("engine ddp is for several processes, but there is one; use torchrun, or --engine plain")

    def micro_batch(self, *, last: bool) -> AbstractContextManager:
        if self.model.replica is self._network:
            self.model.replica = DistributedDataParallel(
                self._network,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            self.model.replica.register_comm_hook(self._buckets, _Buckets.average)
        if self._buckets.wake():
            self._forget_gradients()
        return nullcontext() if last else self.model.replica.no_sync()

    def rest(self) -> None:
        super().rest()
        self._buckets.rest()

    def _forget_gradients(self) -> None:
        # Gradients that are added up stay in the buckets; anew, they would lie beside them until the last micro-batch.
        self._optimizer.zero_grad(set_to_none=not self._accumulates)


class _Replica(nn.Module):
    """Calls a network through what averages its gradients, once there is that.

    Attributes:
        replica: the network, or what stands for it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.replica = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.replica(*args, **kwargs)


class _Buckets:
    """Averages the buckets of a backward pass, and gives their memory back between two of them.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: list[UntypedStorage] = []
        self._sizes: list[int] = []

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Mean of a bucket of gradients over the processes; in a step whose time is split, waited for and timed."""
        world, gradient = self._world, bucket.buffer()
        self._sent.append(gradient.untyped_storage())
        if not world.timer.armed:
            return allreduce_hook(None, bucket)
        gradient.div_(world.world_size)
        with world.timer.part("communication"):
            dist.all_reduce(gradient)
        future = torch.futures.Future(devices=[world.device] if world.device.type == "cuda" else None)
        future.set_result(gradient)
        return future

    def rest(self) -> None:
        """Give back the memory of the last backward pass; gradients, which are views of it, are not to be read."""
        if not self._sizes:
            self._sizes = [storage.nbytes() for storage in self._sent]
            for storage in self._sent:
                storage.resize_(0)

    def wake(self) -> bool:
        """Ahead of a forward pass: whether there is memory anew for gradients, whatever is in it."""
        rested = bool(self._sizes)
        for storage, size in zip(self._sent, self._sizes, strict=False):
            storage.resize_(size)
        # PyTorch may arrange buckets anew in the forward pass, and should not do so beside those of before.
        self._sent, self._sizes = [], []
        return rested
