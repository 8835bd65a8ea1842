"""How much memory a process takes under each engine.

    bytes of a process = steady + max(passes, update) + overhead

steady stays through a step (weights, optimizer state), passes come with forward and backward pass (gradients,
activations, buffers of communication), update with the optimizer's step. Of a network with P values, N processes: S =
ceil(P / N), s bytes of a value: 2 under bf16 and fp16, else 4; A values of the optimizer for each parameter: two
moments, only the second where Adam's beta1 is 0, and the moving average, if there is one; B values of a bucket, W of a
window (`zero_sizes`).

    engine          steady                                passes, besides activations and workspace     update
    plain           4 P + 4 A P                           4 P, and 2 P of 16-bit copies                 4 P
    ddp             4 P + 4 A P                           4 P, and 2 P of 16-bit copies                 4 P
    zero1           s P + 4 S + 4 A S                     s S, and s P if accumulated; buckets          2 s S + fp32 S
    zero2           s P + 4 S + 4 A S                     s S, twice if accumulated; buckets            2 s S + fp32 S
    zero3           2 s S + 4 S + 4 A S + s B + small w.  gathered weights, buckets                     s S + fp32 S
    zero3-offload   s B + small weights                   gathered weights, buckets                     -

where fp32 is 4 under 16 bits, whose gradients are converted for the update, else 0. ddp's gradients are views of its
buckets, which stay if one network alone is trained.

Of several networks (`maskdm_fast.train.plan`) each that is trained has its own steady part; a frozen one takes s P,
whole in every process under every engine. They are trained in turn, so passes and update are those of the update that
takes the most. Only the network that is trained in it has gradients. Its activations are those of all calls through
which gradients go, each with 16-bit copies of its own of weights that are float32: a network that only hands gradients
on keeps what attention, norms and GELU need, but not the inputs of its linear layers. With `MachineConfig.offload_idle`
moments and averages are in the memory of the CPU, but for those of the network whose step it is. What a policy has made
is kept for all images of the process until the end of the step.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py and partition_parameters.py; the tests hold the bytes
equal to those of the tensors of its engines. Rajbhandari et al., "ZeRO", SC 2020, has the same without buffers.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from maskdm_fast.ops.work import FLOAT
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.networks import Network
from maskdm_fast.train.plan import Plan, Update, model_of, plan_of
from maskdm_fast.train.world import World

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3-offload")
"""From the fastest to the one that takes the least memory."""
OVERHEAD = {"cuda": 1.0e9, "cpu": 0.6e9}
"""Bytes that a process takes before its first tensor. On a GPU (context, kernels, workspaces of the libraries) an
assumption, not measured here; on the CPU the resident set of Python, PyTorch and this package, measured on Linux."""
NCCL_BYTES = 0.5e9
"""What NCCL takes besides on a GPU where there are several processes: an assumption, not measured here."""
KEPT_VALUES = 100_000
"""ZeRO 3 keeps parameters of so few values whole: DeepSpeed's default of stage3_param_persistence_threshold."""
STATE = ("moments", "average")
"""What of an optimizer waits in the memory of the CPU with `MachineConfig.offload_idle`."""
LOSS_VALUES = {"denoising": 3, "regression": 3, "sid": 8}
"""Float32 values that a loss keeps for each value of an image."""

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
    machine, plan, item = config.machine, plan_of(config), item_size(config)
    batches = World(torch.device("cpu"), 0, world_size).micro_batches(config.stage.batch_size, machine.micro_batch_size)
    parts = {
        network.name: _part(
            network, engine, world_size, item=network.item(item), accumulates=len(batches) > 1, place=place
        )
        for network in plan.trained
    }
    steady: Counter[str] = Counter(overhead=OVERHEAD[place])
    if place == "cuda" and world_size > 1:
        steady["overhead"] += NCCL_BYTES
    if frozen := sum(network.values for network in plan.networks if not network.trained):
        steady["frozen weights"] = item * frozen
    host: Counter[str] = Counter()
    for part in parts.values():
        steady.update(part.steady)
        host.update(part.host)
    passes, updates = [], []
    for update in plan.updates:
        part = parts[update.network]
        besides = Counter(_activations(config, plan, update, max(map(len, batches))))
        besides.update(part.passes)
        for asked in update.passes:
            network = plan.network(asked.network)
            cast = engine in ("plain", "ddp") and network.trained and network.item(item) < FLOAT
            if cast and asked.gradients != "none":
                besides["16-bit weights"] += item * asked.calls * network.values
        if engine.startswith("zero3"):
            # Each network gathers for itself, and ahead; those that are not trained send no gradients.
            for name in {asked.network for asked in update.passes} & parts.keys() - {update.network}:
                network = plan.network(name)
                bucket = network.item(item) * zero_sizes(network.values).bucket
                besides["gathered weights"] += parts[name].passes["gathered weights"]
                besides["buckets"] += parts[name].passes["buckets"] - bucket
        passes.append(besides)
        updates.append(Counter(part.update))
    if machine.offload_idle and place == "cuda" and len(parts) > 1:
        for update, *taken in zip(plan.updates, updates, *([passes] if plan.early else []), strict=True):
            for phase in taken:
                phase.update({name: parts[update.network].steady.get(name, 0.0) for name in STATE})
        host.update({name: steady.pop(name) for name in STATE if name in steady})
    if plan.trajectory:
        values = plan.trajectory * model_of(config).num_tokens * model_of(config).token_dim
        steady["trajectories"] = FLOAT * values * sum(map(len, batches))
    return Memory(dict(steady), dict(max(passes, key=Counter.total)), dict(max(updates, key=Counter.total)), dict(host))


def _part(network: Network, engine: str, world_size: int, *, item: int, accumulates: bool, place: Place) -> Memory:
    """What a process takes for a network that is trained, without activations and copies of its weights."""
    values, moments, average = network.values, network.moments, int(network.average)
    passes: dict[str, float] = {}
    if engine in ("plain", "ddp"):
        state = {"moments": FLOAT * moments * values, "average": FLOAT * average * values}
        steady = {"weights": FLOAT * values, **state}
        gradients = {"gradients": FLOAT * values}
        return Memory(steady, gradients, gradients)

    shard, sizes = math.ceil(values / world_size), zero_sizes(values)
    state = {"moments": FLOAT * moments * shard, "average": FLOAT * average * shard}
    state = {"master weights": FLOAT * shard, **state}
    converted = 0 if item == FLOAT else FLOAT * shard
    bucket = item * sizes.bucket
    if engine in ("zero1", "zero2"):
        overlap = place == "cuda"
        if engine == "zero2":
            passes["gradients"] = item * shard * (2 if accumulates else 1)
        else:
            passes["gradients"] = item * (values + shard if accumulates or not overlap else shard)
        # Filled and reduced in turn, and the flattened copy that is reduced.
        passes["buckets"] = bucket * (3 if overlap else 2)
        update = {"gradients": item * shard, "flat gradients": item * shard + converted}
        return Memory({"weights": item * values, **state}, passes, update)

    kept, largest = sum(size for size in network.sizes if size <= KEPT_VALUES), max(network.sizes)
    # Whole tensors are gathered until the window is full. Half a window is gathered at once, and lies there twice until
    # it is taken apart; gradients wait in a bucket that stays, and are put together in another.
    passes["gathered weights"] = item * min(values - kept, sizes.window + largest)
    passes["buckets"] = bucket + item * min(values - kept, sizes.window // 2 + largest)
    steady = {"small weights": item * kept, "buckets": bucket}
    local = {"weights": item * shard, "gradients": item * shard, **state}
    if engine == "zero3":
        return Memory(steady | local, passes, {"flat gradients": item * shard + converted})
    host = {**local, "float32 gradients": FLOAT * shard}
    return Memory({**steady, **host}, passes, {}) if place == "cpu" else Memory(steady, passes, {}, host)


def _activations(config: RunConfig, plan: Plan, update: Update, micro_batch: int) -> dict[str, float]:
    """Of a micro-batch of so many images in an update, under the mask that leaves the most patches."""
    item, checkpointing = item_size(config), config.machine.activation_checkpointing
    counts = [count for count, _ in plan.counts]
    totals, widest = [0.0], 0.0
    for count in counts:
        kept = 0.0
        for asked in update.passes:
            network = plan.network(asked.network)
            found = network.saved(count, micro_batch, asked, item=item, checkpointing=checkpointing)
            kept += found.kept
            # The backward pass goes through the last of them first, and gives back what it kept.
            totals.append(kept + found.again)
    for asked in update.passes:
        model = plan.network(asked.network).model
        # Gradients on their way through a block: of the MLP's inner layer, and of the stream.
        width = int(model.dim * model.mlp_ratio) + model.dim
        images = asked.images / asked.calls if asked.gradients != "none" else 1.0
        widest = max(widest, images * (max(counts) + model.num_extras) * width * item)
    model = plan.network(update.network).model
    loss = LOSS_VALUES[update.loss] * max(counts) * model.token_dim * FLOAT
    return {"activations": max(totals) + micro_batch * loss, "workspace": micro_batch * widest}


def gigabytes(size: float) -> str:
    """Bytes in decimal gigabytes, for people; below one in megabytes."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
