"""How much memory a process takes under each engine, and which engine a run takes for that.

    bytes of a process = steady + max(passes, update) + overhead

steady stays through a step (weights, optimizer state), passes come with forward and backward pass (gradients,
activations, buffers of communication), update with the optimizer's step. P values, N processes, S = ceil(P / N), s
bytes of a value: 2 under bf16 and fp16, else 4; B values of a bucket, W of a window (`zero_sizes`).

    engine          steady                               passes, besides activations and workspace     update
    plain           16 P                                 4 P, and 2 P of 16-bit copies                 4 P
    ddp             20 P                                 2 P of 16-bit copies                          -
    zero1           s P + 16 S                           s S, and s P if accumulated; buckets          2 s S + fp32 S
    zero2           s P + 16 S                           s S, twice if accumulated; buckets            2 s S + fp32 S
    zero3           2 s S + 16 S + s B + small weights   gathered weights, buckets                     s S + fp32 S
    zero3-offload   s B + small weights                  gathered weights, buckets                     -

where fp32 is 4 under 16 bits, whose gradients are converted for the update, else 0. ddp's gradients become views of its
buckets when they are sent.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py and partition_parameters.py; the tests hold the bytes
equal to those of the tensors of its engines. Rajbhandari et al., "ZeRO", SC 2020, has the same without buffers.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.ops import backend
from maskdm_fast.ops.work import FLOAT
from maskdm_fast.train.config import MachineConfig, RunConfig
from maskdm_fast.train.costs import saved_bytes, visible_counts
from maskdm_fast.train.world import World

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3-offload")
"""From the fastest to the one that takes the least memory."""
OVERHEAD = {"cuda": 1.0e9, "cpu": 0.6e9}
"""Bytes that a process takes before its first tensor. On a GPU (context, kernels, workspaces of the libraries) an
assumption, not measured here; on the CPU the resident set of Python, PyTorch and this package, measured on Linux."""
NCCL_BYTES = 0.5e9
"""What NCCL takes besides on a GPU where there are several processes: an assumption, not measured here."""
FITTING_SHARE = 0.9
"""Share of a memory that may be planned for; the rest is for what the estimate leaves out, and for fragmentation."""
KEPT_VALUES = 100_000
"""ZeRO 3 keeps parameters of so few values whole: DeepSpeed's default of stage3_param_persistence_threshold."""

Place = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what they are for.

    Attributes:
        steady: what stays through a step.
        passes: what forward and backward pass of a micro-batch take besides.
        update: what the optimizer's step takes besides.
        host: what lies in the memory of the CPU while training is on a GPU.
    """

    steady: Mapping[str, float]
    passes: Mapping[str, float]
    update: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Most bytes at a time on the device."""
        return sum(self.steady.values()) + max(sum(self.passes.values()), sum(self.update.values()))

    @property
    def host_total(self) -> float:
        """Bytes in the memory of the CPU while training is on a GPU."""
        return sum(self.host.values())

    def of(self, name: str) -> float:
        """Most bytes on the device that are for one thing."""
        return self.steady.get(name, 0.0) + max(self.passes.get(name, 0.0), self.update.get(name, 0.0))

    def still_needed(self, taken: float) -> int:
        """Bytes that training will take when `taken` bytes of the device are its own already."""
        return math.ceil(max(0.0, self.total - taken))


@dataclass(frozen=True)
class ZeroSizes:
    """Values that ZeRO sends or gathers at a time.

    Attributes:
        bucket: of gradients that are averaged together.
        window: of weights that stay gathered, or are gathered ahead, under ZeRO 3; those that are used again after
            more than this many are dropped and gathered anew.
    """

    bucket: int
    window: int


def zero_sizes(num_values: int) -> ZeroSizes:
    """Sizes for a network of this many parameters: an eighth of it, 25 to 500 million values, and even.

    DeepSpeed's default, 500 million of each, would hold smaller networks whole: gradients would be divided only after
    all of them were there, and ZeRO 3 would drop no weights between forward and backward pass.
    """
    size = min(num_values, 500_000_000, max(25_000_000, num_values // 8))
    return ZeroSizes(size + size % 2, size + size % 2)


@dataclass(frozen=True)
class _Network:
    """Values of a network: all, those of parameters that ZeRO 3 keeps whole, and those of the largest block."""

    values: int
    kept: int
    block: int


@functools.lru_cache(maxsize=64)
def _network(model: UViTConfig) -> _Network:
    with torch.device("meta"):
        network = UViT(model)
    sizes = [parameter.numel() for parameter in network.parameters()]
    blocks = [*network.in_blocks, network.mid_block, *network.out_blocks]
    return _Network(
        sum(sizes),
        sum(size for size in sizes if size <= KEPT_VALUES),
        max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks),
    )


def model_of(config: RunConfig) -> UViTConfig:
    """The network of a run; with one class where their number is not known before the data set is read."""
    model = config.model
    return dataclasses.replace(model, num_classes=1) if config.class_conditional and not model.num_classes else model


def num_parameters(config: RunConfig) -> int:
    """Parameters of the network of a run."""
    return _network(model_of(config)).values


def item_size(config: RunConfig) -> int:
    """Bytes of an activation."""
    return FLOAT if config.precision == "fp32" else 2


def memory_per_rank(config: RunConfig, engine: str, world_size: int, *, place: Place = "cuda") -> Memory:
    """What one of `world_size` processes takes, its images apart (`Feed` keeps them on the device only if there is
    room).

    Args:
        config: of the run.
        engine: one of `ENGINES`.
        world_size: processes; the batch is divided among them.
        place: kind of device. On a CPU everything lies in its memory, and ZeRO does not reduce gradients beside the
            backward pass.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    stage, machine, model, item = config.stage, config.machine, model_of(config), item_size(config)
    micro_batches = World(torch.device("cpu"), 0, world_size).micro_batches(stage.batch_size, machine.micro_batch_size)
    network, accumulates = _network(model), len(micro_batches) > 1
    passes = _activations(config, max(map(len, micro_batches)))
    steady = {"overhead": OVERHEAD[place] + (NCCL_BYTES if place == "cuda" and world_size > 1 else 0.0)}
    update: dict[str, float] = {}
    host: dict[str, float] = {}
    values = network.values
    if engine in ("plain", "ddp"):
        steady |= {"weights": FLOAT * values, "moments": 2 * FLOAT * values, "average": FLOAT * values}
        passes["gradients"] = update["gradients"] = FLOAT * values
        if engine == "ddp":
            # They lie in its buckets, which stay.
            steady["gradients"] = passes.pop("gradients")
            update = {}
        if item < FLOAT:
            passes["16-bit weights"] = item * values
        return Memory(steady, passes, update)

    shard, sizes = math.ceil(values / world_size), zero_sizes(values)
    state = {"master weights": FLOAT * shard, "moments": 2 * FLOAT * shard, "average": FLOAT * shard}
    converted = 0 if item == FLOAT else FLOAT * shard
    bucket = item * sizes.bucket
    if engine in ("zero1", "zero2"):
        steady |= {"weights": item * values, **state}
        overlap = place == "cuda"
        if engine == "zero2":
            passes["gradients"] = item * shard * (2 if accumulates else 1)
        else:
            passes["gradients"] = item * (values + shard if accumulates or not overlap else shard)
        # Filled and reduced in turn, and the flattened copy that is reduced.
        passes["buckets"] = bucket * (3 if overlap else 2)
        update |= {"gradients": item * shard, "flat gradients": item * shard + converted}
        return Memory(steady, passes, update)

    gathered = min(values - network.kept, 2 * sizes.window + network.block)
    passes["gathered weights"] = item * gathered
    # All that is gathered at once lies there twice while it is put together; gradients wait, and are put together.
    passes["buckets"] = 2 * bucket + item * min(values - network.kept, max(sizes.window, network.block))
    steady |= {"small weights": item * network.kept, "buckets": bucket}
    local = {"weights": item * shard, "gradients": item * shard, **state}
    if engine == "zero3":
        return Memory(steady | local, passes, {"flat gradients": item * shard + converted})
    host = {**local, "float32 gradients": FLOAT * shard}
    if place == "cpu":
        steady, host = {**steady, **host}, {}
    return Memory(steady, passes, {}, host)


def _activations(config: RunConfig, micro_batch: int) -> dict[str, float]:
    """Of a micro-batch of so many images, under the mask that leaves the most patches."""
    model, item = model_of(config), item_size(config)
    side = model.image_size // model.patch_size
    checkpointing = config.machine.activation_checkpointing
    counts = [count for count, _ in visible_counts(config.stage, (side, side))]
    saved = max(saved_bytes(model, count, item=item, checkpointing=checkpointing) for count in counts)
    # Gradients on their way through a block: of the MLP's inner layer, and of the stream.
    width = int(model.dim * model.mlp_ratio) + model.dim
    workspace = (max(counts) + model.num_extras) * width * item
    return {"activations": micro_batch * saved, "workspace": micro_batch * workspace}


def check_engine(config: RunConfig, engine: str, world_size: int) -> None:
    """Raise for an engine that cannot do what the run asks for; the message says the mend.

    Args:
        config: of the run.
        engine: one of `ENGINES`.
        world_size: processes.

    Raises:
        ValueError: the engine does not go with the processes or with the options.
        RuntimeError: it needs DeepSpeed, which is not installed.
    """
    machine = config.machine
    if engine == "plain" and world_size > 1:
        raise ValueError(f"engine plain is one process, but there are {world_size}; use --engine ddp")
    if engine == "ddp" and world_size == 1:
        raise ValueError("engine ddp is for several processes, but there is one; start it with torchrun, or use plain")
    if engine in ("plain", "ddp"):
        return
    if backend.package_versions()["deepspeed"] is None:
        raise RuntimeError(
            f"engine {engine} is DeepSpeed's, which is not installed; pip install 'maskdm_fast[deepspeed]', or use "
            "--engine ddp (one process: plain)"
        )
    if config.stage.optimizer == "lamb":
        raise ValueError(f"optimizer lamb needs the norms of whole tensors, which {engine} divides; use plain or ddp")
    if machine.optimizer_kernel == "apex" or machine.layer_norm == "apex":
        raise ValueError(f"the kernels of apex are for the engines plain and ddp, not for {engine}; leave them out")
    if machine.cuda_graph:
        raise ValueError(
            f"{engine} decides on the host what to send, which a CUDA graph cannot record; leave out --cuda-graph, or "
            "use plain or ddp"
        )
    if machine.compile and engine.startswith("zero3"):
        raise ValueError(
            f"{engine} gathers and drops weights around every layer, which torch.compile cannot trace; leave out "
            "--compile, or use zero2"
        )


def choose_engine(
    config: RunConfig, world_size: int, device_memory: float | None, host_memory: float | None = None
) -> tuple[str, str]:
    """The engine that a run takes: the one it names, else the first of `ENGINES` that fits.

        fits:  memory_per_rank <= 0.9 device_memory,  and on the host likewise

    Args:
        config: of the run.
        world_size: processes.
        device_memory: bytes of the device for each process; None: not known, then everything fits.
        host_memory: bytes of the CPU's memory for each process that trains on a GPU, inf where it is not known; None:
            training is on the CPU itself, and offloading moves nothing.

    Returns:
        Its name, and in words why.

    Raises:
        ValueError: the named engine cannot work, or none fits.
        RuntimeError: as `check_engine`.
    """
    named = config.machine.engine
    if named != "auto":
        check_engine(config, named, world_size)
        return named, "named by --engine"
    place: Place = "cpu" if host_memory is None else "cuda"
    found = {name: _judge(config, name, world_size, place) for name in _candidates(world_size, place)}
    if device_memory is None:
        name = next(iter(found))
        return name, "the memory of the device is not known"
    passed = []
    for name, memory in found.items():
        if isinstance(memory, str):
            passed.append(memory)
        elif _fits(memory, device_memory, host_memory):
            why = f"{gigabytes(memory.total)} of {gigabytes(device_memory)} a process"
            return name, why + (f" ({'; '.join(passed)})" if passed else "")
        else:
            passed.append(f"{name} takes {gigabytes(memory.total)}" + _on_host(memory))
    raise ValueError(
        f"no engine fits {'one process' if world_size == 1 else f'{world_size} processes'} with "
        f"{gigabytes(device_memory)} each, of which {FITTING_SHARE:.0%} may be planned for: {'; '.join(passed)}. "
        + _mend(config, world_size, device_memory, host_memory)
    )


def room_for_data(memory: Memory, device_memory: float) -> int:
    """Bytes of the device that may hold a data set: what a process may plan for and training does not take."""
    return max(0, int(FITTING_SHARE * device_memory - memory.total))


def gigabytes(size: float) -> str:
    """Bytes in decimal gigabytes, for people; below one in megabytes."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _candidates(world_size: int, place: Place) -> list[str]:
    # Zero 1 to 3 divide nothing in one process.
    names = ["plain", "zero3-offload"] if world_size == 1 else list(ENGINES[1:])
    return [name for name in names if place == "cuda" or name != "zero3-offload"]


def _judge(config: RunConfig, engine: str, world_size: int, place: Place) -> Memory | str:
    """What an engine takes; or, in words, why it cannot run."""
    try:
        check_engine(config, engine, world_size)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return memory_per_rank(config, engine, world_size, place=place)


def _fits(memory: Memory, device_memory: float, host_memory: float | None) -> bool:
    on_host = host_memory is None or memory.host_total <= FITTING_SHARE * host_memory
    return on_host and memory.total <= FITTING_SHARE * device_memory


def _on_host(memory: Memory) -> str:
    return f" and {gigabytes(memory.host_total)} of the CPU's" if memory.host else ""


def _mend(config: RunConfig, world_size: int, device_memory: float, host_memory: float | None) -> str:
    """What would fit, as options; the first of each kind."""
    place: Place = "cpu" if host_memory is None else "cuda"

    def engine_for(machine: MachineConfig, processes: int) -> str | None:
        changed = dataclasses.replace(config, machine=machine)
        for name in _candidates(processes, place):
            memory = _judge(changed, name, processes, place)
            if isinstance(memory, Memory) and _fits(memory, device_memory, host_memory):
                return f"{name}, {gigabytes(memory.total)}"
        return None

    def smaller(machine: MachineConfig) -> tuple[int, str] | None:
        size = min(machine.micro_batch_size or config.stage.batch_size, config.stage.batch_size // world_size) // 2
        while size:
            engine = engine_for(dataclasses.replace(machine, micro_batch_size=size), world_size)
            if engine is not None:
                return size, engine
            size //= 2
        return None

    machine, mends = config.machine, []
    light = dataclasses.replace(machine, activation_checkpointing=True)
    if found := smaller(machine):
        mends.append("--micro-batch-size {} ({})".format(*found))
    if not machine.activation_checkpointing:
        if engine := engine_for(light, world_size):
            mends.append(f"--activation-checkpointing ({engine})")
        elif not mends and (found := smaller(light)):
            mends.append("--activation-checkpointing with --micro-batch-size {} ({})".format(*found))
    processes = 2 * world_size
    while config.stage.batch_size % processes == 0:
        if engine := engine_for(machine, processes):
            mends.append(f"{processes} processes ({engine})")
            break
        processes *= 2
    return f"What would fit: {'; '.join(mends)}." if mends else "Make the model smaller (--model.dim, --model.depth)."
