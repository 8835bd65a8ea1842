"""What engines really take, in processes of their own: `held` sees every tensor of its process.

    python memory_harness.py plain CONFIG     what `plain_step` says of a configuration in JSON, as one line of it
    python memory_harness.py stage CONFIG...  what `stage_step` says, likewise, a line of each
    torchrun memory_harness.py CASE...        what the engines of several processes take, as one line by rank 0

A case is ENGINE:PRECISION, or ENGINE:PRECISION:METHOD for score distillation, whose ``passes`` are of a whole step. Of
every engine, in bytes of the CPU's allocator: ``steady``, what is held between steps;
``passes`` and ``update``, the most that forward and backward pass, and the optimizer's step, had besides; ``left``,
what is held after the engine was closed; and the first three as `memory_per_rank` has them.
"""

import functools
import gc
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from maskdm_fast.diffusion import MaskedObjective, make_schedule
from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.models import CONFIGS, UViT
from maskdm_fast.train import memory, zero_engine
from maskdm_fast.train.checkpoint import Checkpoint
from maskdm_fast.train.config import DenoisingConfig, MachineConfig, RunConfig, ScoreDistillationConfig
from maskdm_fast.train.engine import DTYPES, EngineSettings, OptimizerSettings, make_engine
from maskdm_fast.train.plan import plan_of
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World, disconnect, make_world

MODEL = replace(CONFIGS["emoji32"], dim=192, num_heads=3)
NUM_MICRO = 2


def held() -> int:
    """Bytes of all tensors, each piece of memory once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some modules is deprecated
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        tensors = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(work: Callable[[], object]) -> int:
    """Most bytes that the allocator gave out during `work`, besides those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    total, most = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


class Finished:
    """Work that is done, and keeps its tensors as Gloo's and NCCL's do."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def wait(self) -> None:
        pass

    def get_future(self) -> torch.futures.Future:
        future = torch.futures.Future()
        future.set_result(self.tensors)
        return future


def apart(collective: Callable) -> Callable:
    """`collective`, on copies and in a thread that the profiler does not see.

    Gloo's threads may be the last to let go of a tensor. The profiler sees only the thread that started it: it would
    count what they free for good. The copies are emptied, for `held` would count those that a thread still has.
    """

    def call(*args: object, async_op: bool = False, **named: object) -> Finished | None:
        given: list[torch.Tensor] = []

        def work() -> None:
            copies = []

            def copy(tensor: torch.Tensor) -> torch.Tensor:
                given.append(tensor)
                copies.append(tensor.clone())
                return copies[-1]

            with torch.no_grad():
                places, names = tree_map_only(torch.Tensor, copy, (args, named))
                collective(*places, **names)
                for tensor, found in zip(given, copies, strict=True):
                    tensor.copy_(found)
                    found.untyped_storage().resize_(0)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(work).result()
        return Finished(given) if async_op else None

    return call


def plain_step(config: RunConfig) -> tuple[int, int, int]:
    """Bytes between the steps of the plain engine, and at most besides in forward and backward, and in the update."""
    before = held()
    model = UViT(config.model)
    model.activation_checkpointing = config.machine.activation_checkpointing
    world = World(torch.device("cpu"))
    engine = make_engine("plain", model, OptimizerSettings((0.9, 0.99), 0.0, None, 0.999), EngineSettings(), world)
    objective = MaskedObjective(make_schedule("cosine"), NoMask(), config.model.patch_size, layout="bhwc")
    size = config.machine.micro_batch_size
    images = torch.zeros(size, 32, 32, 3, dtype=torch.uint8)

    def passes() -> None:
        for first in range(0, config.stage.batch_size, size):
            slots = torch.arange(first, first + size)
            engine.backward(objective(engine.model, images, None, seed=0, step=0, slots=slots)["loss"])

    passes()
    engine.step(1e-4)
    steady = held() - before - images.nbytes
    return steady, peak(passes), peak(lambda: engine.step(1e-4))


def stage_step(config: RunConfig, world: World) -> tuple[int, int, int]:
    """Bytes between the steps of a distillation, at most besides in a step, and after it was closed."""
    before = held()
    there = replace(config, stage=DenoisingConfig(label_drop=0.1))
    teacher = Weights(there, UViT(config.model).state_dict(), Checkpoint(Path(), {}), "ema")
    stage = build_stage(config, world, None, teacher)
    del teacher
    size, side = config.machine.micro_batch_size, config.model.image_size
    batches = [
        Batch(torch.zeros(size, side, side, 3, dtype=torch.uint8), torch.full((size,), -1), torch.arange(size) + first)
        for first in range(0, config.stage.batch_size // world.world_size, size)
    ]
    period = plan_of(config).period
    for step in range(2 * period):  # ZeRO 3 knows after the first step what is used when
        stage.step(batches, step)
    before += sum(batch.images.nbytes for batch in batches)
    steady = held() - before
    besides = max(peak(functools.partial(stage.step, batches, step)) for step in range(period))
    stage.close()
    del stage
    return steady, besides, held() - before


def measure(name: str, precision: str, world: World) -> dict[str, float]:
    with torch.device("meta"):
        model, shapes = UViT(MODEL), UViT(MODEL)
    num_values = sum(parameter.numel() for parameter in model.parameters())
    # A small network stands for one that is larger than a bucket.
    sizes = memory.ZeroSizes(num_values // 8 // 2 * 2, num_values // 8)
    memory.zero_sizes = zero_engine.zero_sizes = lambda _: sizes
    base = held()
    optimizer = OptimizerSettings((0.9, 0.99), 0.0, None, 0.999)
    values = functools.partial(shapes.initial_value, seed=0)
    engine = make_engine(name, model, optimizer, EngineSettings(precision, NUM_MICRO), world, values)
    tokens = torch.zeros(1, 1, MODEL.token_dim, dtype=DTYPES[precision])
    place, time = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def passes() -> None:
        for number in range(NUM_MICRO):
            with engine.micro_batch(last=number == NUM_MICRO - 1), engine.autocast():
                engine.backward(engine.model(tokens, time, place).float().square().mean())

    for _ in range(2):  # ZeRO 3 knows after the first step what is used when
        passes()
        engine.step(1e-4)
        engine.rest()
    steady = held() - base
    in_passes = peak(passes)
    left = held() - base - steady
    in_update = left + peak(lambda: engine.step(1e-4))
    engine.close()
    left = held() - base
    config = RunConfig(
        model=MODEL,
        precision=precision,
        stage=DenoisingConfig(batch_size=NUM_MICRO * world.world_size),
        machine=MachineConfig(micro_batch_size=1),
    )
    said = memory.memory_per_rank(config, name, world.world_size, place="cpu")
    # Of one token: too few to count.
    activations = said.passes["activations"] + said.passes["workspace"]
    return {
        "values": num_values,
        "steady": steady,
        "passes": in_passes,
        "update": in_update,
        "left": left,
        "said_steady": sum(said.steady.values()) - memory.OVERHEAD["cpu"],
        "said_passes": sum(said.passes.values()) - activations,
        "said_update": sum(said.update.values()),
    }


def measure_stage(engine: str, precision: str, method: str, world: World) -> dict[str, float]:
    num_values = sum(parameter.numel() for parameter in UViT(MODEL).parameters())
    sizes = memory.ZeroSizes(num_values // 8 // 2 * 2, num_values // 8)
    memory.zero_sizes = zero_engine.zero_sizes = lambda _: sizes
    config = RunConfig(
        model=MODEL,
        precision=precision,
        stage=ScoreDistillationConfig(method=method, fake_updates=1, batch_size=NUM_MICRO * world.world_size),
        machine=MachineConfig(micro_batch_size=1, engine=engine),
    )
    steady, besides, left = stage_step(config, world)
    said = memory.memory_per_rank(config, engine, world.world_size, place="cpu")
    return {
        "values": num_values,
        "steady": steady,
        "passes": besides,
        "update": 0,
        "left": left,
        "said_steady": sum(said.steady.values()) - memory.OVERHEAD["cpu"],
        "said_passes": sum(said.passes.values()),
        "said_update": sum(said.update.values()),
    }


def main() -> None:
    if sys.argv[1] in ("plain", "stage"):
        for config in map(RunConfig.from_dict, map(json.loads, sys.argv[2:])):
            alone = sys.argv[1] == "plain"
            print(json.dumps(plain_step(config) if alone else stage_step(config, World(torch.device("cpu")))))
        return
    for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "reduce_scatter_tensor"):
        setattr(distributed, name, apart(getattr(distributed, name)))
    world = make_world("cpu")
    found = {}
    for case in sys.argv[1:]:
        words = case.split(":")
        found[case] = (measure if len(words) == 2 else measure_stage)(*words, world)
    if world.is_main:
        print("\n" + json.dumps(found), flush=True)
    disconnect()


if __name__ == "__main__":
    main()
