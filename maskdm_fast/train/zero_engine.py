"""DeepSpeed ZeRO: optimizer state, gradients and weights divided among the processes. The only place that imports
deepspeed."""

import logging
import os
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskdm_fast.optim.ema_optimizer import EMAOptimizer, cut_by_value_
from maskdm_fast.train.engine import DTYPES, EngineSettings, OptimizerSettings, Values, Work, compile_in_place, made
from maskdm_fast.train.extras import require
from maskdm_fast.train.idle import IdleState
from maskdm_fast.train.loss_scale import LossScale
from maskdm_fast.train.memory import KEPT_VALUES, zero_sizes
from maskdm_fast.train.pieces import Fragment, Pieces, Reader
from maskdm_fast.train.world import LAUNCHED_LOCAL_RANK, World

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3}


@dataclass(frozen=True)
class _Share:
    """This process's part of one parameter.

    Attributes:
        flat: key of the optimizer's state: a flat float32 tensor with parts of many parameters.
        place: where the part begins in it.
        start, count: which values of the flattened parameter they are.
    """

    flat: Tensor
    place: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """The values of this part in a tensor that is laid out like `flat`."""
        return tensor.detach().narrow(0, self.place, self.count)


class ZeroEngine:
    """DeepSpeed ZeRO around our optimizer, whose state DeepSpeed divides with the moving average in it. Implements
    `Engine`.

    Under bf16 and fp16 weights and gradients have 16 bits and the trained weights are float32 copies, divided like the
    optimizer's state. Checkpoints hold what each process owns, parameter by parameter, and know nothing of DeepSpeed.

    Args:
        name: zero1 (optimizer state is divided), zero2 (gradients too), zero3 (weights too) or zero3-offload (zero3 in
            the memory of the CPU).
        model: the network, on the meta device or with the values, the same in all processes; it becomes DeepSpeed's.
        optimizer: its settings.
        settings: how to compute.
        world: the processes.
        values: of the parameters.

    Raises:
        RuntimeError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        values: Values,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        self._stage, self._world, self._precision = STAGES[name], world, settings.precision
        if not dist.is_initialized():
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.device = world.device
        tell_device(self.device)
        clip, sizes = optimizer.max_grad_norm or 0.0, [param.numel() for param in model.parameters()]
        config = _config(name, settings, clip, sum(sizes), self.device)
        self._shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        if self._stage == 3:
            parameters = _Parameters(made(model, values, DTYPES[settings.precision]))
            deepspeed.zero.Init(module=parameters, config_dict_or_path=config)
        elif any(param.is_meta for param in model.parameters()):
            list(made(model, values))
        compile_in_place(settings.compiled, self.device)
        self._params = dict(model.named_parameters())
        # DeepSpeed clips: a process sees a part of the gradient only. And before that, gradients are cut by value here.
        own = optimizer.make(model.parameters(), max_grad_norm=None, max_grad_value=None, compute_grad_norm=False)
        self._max_grad_value = optimizer.max_grad_value
        self.model, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=own, config=config, dist_init_required=False
        )
        if settings.precision == "fp16":
            # At the least scale an overflow means divergence, which the meter tells better.
            self._zero.loss_scaler.raise_error_at_min_scale = False
            self._zero.loss_scaler.min_scale = LossScale.least  # its configuration takes whole numbers
        self._optimizer, self._averages = own, optimizer.ema_decay is not None
        self._offloads = name == "zero3-offload"
        moves = settings.offload_idle and not self._offloads and self.device.type == "cuda"
        self._idle = IdleState(own, torch.device("cpu") if self._offloads else self.device, moves)
        self._shares = self._find_shares()
        for name, share in self._shares.items():
            # DeepSpeed has made them of weights that were rounded to 16 bits.
            share.of(share.flat).copy_(values(name).flatten()[share.start : share.start + share.count])
        self._make_states()

    def _flats(self) -> list[Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _make_states(self) -> None:
        """The optimizer's state, moving average included, from the float32 weights before the first step."""
        (group,) = self._optimizer.param_groups
        before, group["params"] = group["params"], list(self._flats())
        self._optimizer.make_state()
        group["params"] = before
        if self._stage < 3:
            # DeepSpeed would only know it from the first step on, but the average may be asked for before.
            self._zero._lazy_init_hp_params_optimizer_state()

    def _find_shares(self) -> dict[str, _Share]:
        """The parts of this process, by name of the parameter; it need not have a part of every one."""
        shares = {}
        for name, param in self._params.items():
            if self._stage == 3:
                index, place, count = self._zero.grad_position[self._zero.get_param_id(param)]
                start = self._world.rank * count
                count = min(count, param.ds_numel - start)  # the last part is padded
                if count > 0:
                    shares[name] = _Share(self._flats()[index], place, start, count)
            elif param._hp_mapping is not None:
                mapping = param._hp_mapping
                place, part = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                flat = self._flats()[mapping.param_group_index]
                shares[name] = _Share(flat, place.start, part.start, part.numel)
        return shares

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        with self._timed_communication():
            yield
        if not last:
            self.model.step()  # counts the micro-batch

    def run(self, work: Work, constants: Hashable, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return work(constants, tensors)

    def autocast(self) -> AbstractContextManager:
        return nullcontext()  # the weights themselves have the precision

    def backward(self, loss: Tensor) -> None:
        with self._world.timer.part("backward"):
            self.model.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> dict[str, Tensor]:
        with self._world.timer.part("optimizer"), self._timed_communication():
            self.wake()
            if self._max_grad_value is not None:
                self._cut_gradients(self._max_grad_value)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            scale = self._zero.loss_scale
            self.model.step()
            overflow, norm = self._zero.overflow, self.model.get_global_grad_norm()
            norm = torch.as_tensor(torch.nan if overflow else norm, dtype=torch.float32, device=self.device)
            # -1 is DeepSpeed's word for a norm that is not finite.
            values = {"grad_norm": torch.where(norm < 0, torch.nan, norm)}
            if self._precision == "fp16":
                values["loss_scale"] = torch.full_like(norm, scale)
                values["skipped"] = torch.full_like(norm, float(overflow and scale > LossScale.least))
            return values

    def _cut_gradients(self, limit: float) -> None:
        """Cut this process's part of the averaged gradients by value; the optimizer would be too late, for DeepSpeed
        skips the steps whose norm is not finite."""
        if not self._offloads:
            parts = self._zero.averaged_gradients.values()
            cut_by_value_([grad for grads in parts if grads is not None for grad in grads], limit)
            return
        cut_by_value_([flat.grad for flat in self._flats()], limit)
        for name, share in self._shares.items():  # it has taken the norms as the gradients came
            param_id = self._zero.get_param_id(self._params[name])
            self._zero.norm_for_param_grads[param_id] = share.of(share.flat.grad).norm()

    def rest(self) -> None:
        self._idle.rest()

    def wake(self) -> None:
        self._idle.wake()

    def averaged(self) -> dict[str, Tensor]:
        if not self._averages:
            raise RuntimeError("ema_decay is None, so there is no average of the weights")
        gather = _import_deepspeed(self.device).utils.safe_get_full_optimizer_state
        with self._idle.awake():
            return {name: gather(param, "ema").view(self._shapes[name]) for name, param in self._params.items()}

    def pieces(self) -> Pieces:
        groups: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, **({"ema": {}} if self._averages else {})}
        for name, share in self._shares.items():
            state, shape = self._optimizer.state[share.flat], self._shapes[name]
            groups["model"][name] = Fragment(share.of(share.flat), share.start, shape)
            for slot in _slots_in(state):
                group, key = ("ema", name) if slot == "ema" else ("optimizer", f"{slot}.{name}")
                groups[group][key] = Fragment(share.of(self._idle.held(state[slot])), share.start, shape)
            if share.start == 0:
                groups["optimizer"][f"step.{name}"] = torch.tensor(int(state["step"]))
        if self._precision == "fp16" and self._world.is_main:
            scaler = self._zero.loss_scaler
            streak = scaler.cur_iter - scaler.last_overflow_iter - 1  # goes on when the scale has doubled
            groups["loss_scale"] = {
                "scale": torch.tensor(float(scaler.cur_scale)),
                "streak": torch.tensor(streak % LossScale.growth_interval),
            }
        return groups

    def load(self, reader: Reader) -> None:
        with self._idle.awake():
            self._load_trained(reader)
        self._load_computed(reader)
        if self._precision == "fp16" and reader.names("loss_scale"):
            scaler = self._zero.loss_scaler
            scaler.cur_scale = float(reader.tensor("loss_scale", "scale"))
            scaler.last_overflow_iter = scaler.cur_iter - int(reader.tensor("loss_scale", "streak")) - 1

    def _load_trained(self, reader: Reader) -> None:
        """The weights that are trained, and the optimizer's state."""
        saved = {group: reader.names(group) for group in ("optimizer", "ema")}
        for name, share in self._shares.items():
            stop = share.start + share.count
            share.of(share.flat).copy_(reader.fragment("model", name, share.start, stop))
            if f"step.{name}" not in saved["optimizer"]:
                continue  # saved before the first step
            state = self._optimizer.state[share.flat]
            for slot in _slots_in(state):
                group, key = ("ema", name) if slot == "ema" else ("optimizer", f"{slot}.{name}")
                if key not in saved[group]:
                    raise ValueError(f"what was saved has no {slot} of {name}; it comes from a run with other settings")
                share.of(state[slot]).copy_(reader.fragment(group, key, share.start, stop))
            state["step"] = int(reader.tensor("optimizer", f"step.{name}"))

    @torch.no_grad()
    def _load_computed(self, reader: Reader) -> None:
        """The weights that the forward pass uses, which are copies of the trained ones."""
        if self._stage < 3:
            for name, param in self._params.items():
                param.copy_(reader.tensor("model", name))
            return
        # Small weights are kept gathered: DeepSpeed has to drop them, and gather them again from the new parts.
        kept = self._zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
        for name, share in self._shares.items():
            part = self._params[name].ds_tensor
            part.narrow(0, 0, share.count).copy_(share.of(share.flat))
        if kept:
            kept[0].all_gather(kept)

    def close(self) -> None:
        self.model.destroy()
        # Hooks that refer to each other keep DeepSpeed's objects alive, but what they hold can be given back.
        tensors = []
        for value in vars(self._zero).values():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            tensors += [item for item in items if isinstance(item, Tensor)]
        tensors += [*self._flats(), *self._params.values()]
        tensors += [flat.grad for flat in self._flats() if flat.grad is not None]
        tensors += [param.ds_tensor for param in self._params.values() if self._stage == 3]
        for state in self._optimizer.state.values():
            tensors += [state[slot] for slot in _slots_in(state)]
        self._idle.forget()
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)

    @contextmanager
    def _timed_communication(self) -> Iterator[None]:
        """Add what DeepSpeed spends on communication to the timer, in a step whose time is split."""
        if not self._world.timer.armed:
            yield
            return
        from deepspeed.comm import comm

        comm.configure(enabled=True, prof_all=True, verbose=False)
        comm.comms_logger.comms_dict.clear()
        for timer in comm.timers.get_timers().values():
            timer.reset()  # else they go on from the last time
        try:
            yield
        finally:
            comm.configure(enabled=False, prof_all=False)
        for sizes in comm.comms_logger.comms_dict.values():
            # An entry is what all calls of this operation have taken until then.
            total = max(milliseconds[-1] for _, milliseconds, *_ in sizes.values())
            self._world.timer.add("communication", total / 1e3)


def tell_device(device: torch.device) -> None:
    """Set LOCAL_RANK, by which DeepSpeed takes its GPU for as long as it lives, to the number of the process's own.
    They differ where a scheduler shows each process one GPU, and where --device names another than the first."""
    if device.type != "cuda":
        os.environ.setdefault("LOCAL_RANK", "0")  # it wants to be told
        return
    os.environ.setdefault(LAUNCHED_LOCAL_RANK, os.environ.get("LOCAL_RANK", "0"))
    for name in {"LOCAL_RANK", *({"OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys())}:  # which must agree
        os.environ[name] = str(device.index or 0)


def _slots_in(state: dict[str, Any]) -> list[str]:
    return [slot for slot in EMAOptimizer.SLOTS if slot in state]


class _Parameters(nn.Module):
    """What DeepSpeed divides: parameters that are made while it asks for them."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self._iterator = parameters

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._iterator


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed tells every step of its set-up, and PyTorch's builder of extensions, which it imports, about GPUs.
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed = require("deepspeed", "deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it has set another one
    # It calls functions of PyTorch that have new names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # An all-reduce for inference that would be compiled now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(
    name: str, settings: EngineSettings, max_grad_norm: float, num_values: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    sizes = zero_sizes(num_values)
    zero: dict[str, Any] = {
        "stage": STAGES[name],
        "reduce_bucket_size": sizes.bucket,
        "overlap_comm": device.type == "cuda",
    }
    if STAGES[name] == 3:
        zero |= {
            "stage3_prefetch_bucket_size": sizes.window // 2,
            "stage3_max_live_parameters": sizes.window,
            "stage3_max_reuse_distance": sizes.window,
            "stage3_param_persistence_threshold": KEPT_VALUES,
        }
    else:
        zero["allgather_bucket_size"] = sizes.bucket
    if name == "zero3-offload":
        place = {"device": "cpu", "pin_memory": device.type == "cuda"}
        zero |= {"offload_optimizer": place, "offload_param": place}
    return {
        "train_micro_batch_size_per_gpu": 1,  # not used: batches are made here
        "gradient_accumulation_steps": settings.num_micro,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours steps offloaded state, too
        # Looking for overflows would wait for the device in every step; the meter finds them at log intervals.
        "bf16": {"enabled": settings.precision == "bf16", "check_grad_overflow": False},
        "fp16": {
            "enabled": settings.precision == "fp16",
            "initial_scale_power": int(LossScale.initial).bit_length() - 1,
            "loss_scale_window": LossScale.growth_interval,
            "hysteresis": 1,
        },
        "steps_per_print": 2**62,
    }
