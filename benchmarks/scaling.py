"""Measure every training engine at one and several processes against plain PyTorch: ``python -m benchmarks.scaling``.

Contestants, each in processes of its own that stay up and take turns, after a check that all losses agree:

- plain, ddp, zero1, zero2, zero3, zero3-offload: `DenoisingStage.step` on that engine, what training runs;
- pytorch-ddp: the same network and step as well written as PyTorch allows (`benchmarks.plain_uvit`): AdamW(fused=True),
  clip_grad_norm_ and a foreach EMA, its gradients averaged by DistributedDataParallel; one process goes without it.

The batch is the same however many processes share it. On the CPU they share its threads as well; on GPUs each has one.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from benchmarks.plain_uvit import Draws, PlainStep
from maskdm_fast import random
from maskdm_fast.diffusion import PatchMask
from maskdm_fast.models import CONFIGS, UViT, UViTConfig
from maskdm_fast.ops import backend
from maskdm_fast.random import Stream
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, MachineConfig, RunConfig
from maskdm_fast.train.engine import autocast
from maskdm_fast.train.memory import memory_per_rank
from maskdm_fast.train.plan import num_parameters
from maskdm_fast.train.stages import Batch, DenoisingStage
from maskdm_fast.train.world import World, disconnect, make_world

PEER = "pytorch-ddp"
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3-offload", PEER)

_PARITY_STEPS = 4
_SAMPLE_SECONDS = 0.5
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every contestant does: a network, images per step, the share of masked patches, the engine's precision."""

    model: UViTConfig
    batch: int
    mask_ratio: float
    precision: str

    def config(self, engine: str) -> RunConfig:
        """The run whose steps are measured: eps on the linear schedule, clipping and EMA on."""
        stage = DenoisingConfig(mask=PatchMask(self.mask_ratio), batch_size=self.batch)
        diffusion = DiffusionConfig(schedule="linear", prediction="eps")
        machine = MachineConfig(engine=engine)
        return RunConfig(model=self.model, diffusion=diffusion, stage=stage, machine=machine, precision=self.precision)

    def images(self) -> Tensor:
        """uint8 ``[B, h, w, C]``, the global batch."""
        side, channels = self.model.image_size, self.model.channels
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (self.batch, side, side, channels), dtype=torch.uint8, generator=generator)


WORKLOAD = Workload(
    UViTConfig(image_size=64, patch_size=4, dim=320, depth=9, num_heads=5), batch=32, mask_ratio=0.9, precision="fp32"
)

ESTIMATED_PROCESSES = 8
ESTIMATED_NETWORKS = {
    f"width {width}, depth {depth}": UViTConfig(
        image_size=32, patch_size=2, channels=4, dim=width, depth=depth, num_heads=width // 128
    )
    for width, depth in ((768, 13), (1152, 29), (2048, 29), (3072, 33), (4096, 41))
}


class Ours:
    """One of our engines; `step` is a train step, which returns the loss of this process's share."""

    def __init__(self, workload: Workload, engine: str, world: World):
        slots = world.slots(workload.batch)
        images, labels = workload.images()[slots], torch.full((len(slots),), -1)
        self._batch = Batch(*(tensor.to(world.device) for tensor in (images, labels, slots)))
        self._stage, self._count = DenoisingStage.build(workload.config(engine), world, None), 0

    def step(self, *, same_draws: bool = False) -> Tensor:
        self._count += 1
        return self._stage.step([self._batch], self._count - 1)["loss"]


class Peer:
    """Plain PyTorch; `step` as of `Ours`. It draws from PyTorch's generator, or as we do (`same_draws`)."""

    def __init__(self, workload: Workload, world: World):
        self._config, self._device = workload.config("plain"), world.device
        slots = world.slots(workload.batch)
        self._slots, self._images = slots.to(world.device), workload.images()[slots].to(world.device)
        model, side = workload.model, workload.model.image_size // workload.model.patch_size
        stage, self._grid = self._config.stage, (side, side)
        with torch.device(world.device):
            self._peer = PlainStep(
                UViT(model, seed=self._config.seed),
                self._config.diffusion.noise_schedule(model),
                stage.mask.num_visible(self._grid),
                stage,
            )
        if world.world_size > 1:
            self._peer.network = DistributedDataParallel(self._peer.network, gradient_as_bucket_view=True)
        self._count = 0

    def step(self, *, same_draws: bool = False) -> Tensor:
        self._count += 1
        draws = self._our_draws(self._count - 1) if same_draws else None
        with autocast(self._device, self._config.precision):
            return self._peer(self._images, draws)

    def _our_draws(self, step: int) -> Draws:
        model, mask = self._config.model, self._config.stage.mask
        at = {"seed": self._config.seed, "step": step, "slots": self._slots}
        t = self._config.diffusion.draw(self._config.stage.batch_size)(self._peer.schedule, **at)
        eps = random.normal(model.num_tokens * model.token_dim, stream=Stream.NOISE, **at)
        return Draws(t, mask.sample(self._grid, **at), eps.view(len(self._images), -1, model.token_dim))


def _serve(connection: Connection, workload: Workload, engine: str, threads: int) -> None:
    """One process of a contestant: does what it is told until the pipe closes."""
    torch.set_num_threads(threads)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # DeepSpeed speaks there, where the result goes
    # DeepSpeed calls functions by names that newer versions of PyTorch have replaced, and each call says so.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        world = make_world()
        contestant = Peer(workload, world) if engine == PEER else Ours(workload, engine, world)
        gc.collect()
        gc.disable()
        while (order := connection.recv()) is not None:
            what, count = order
            if what == "losses":
                connection.send([contestant.step(same_draws=True).item() for _ in range(count)])
            elif what == "time":
                connection.send(_seconds(contestant, count, world))
            else:
                connection.send(backend.peak_memory(world.device))
        disconnect()
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


def _seconds(contestant: Ours | Peer, count: int, world: World) -> float:
    """Of `count` steps, until the last process is done with them."""
    world.everywhere(lambda: None)
    begin = time.perf_counter()
    for _ in range(count):
        contestant.step()
    backend.synchronize(world.device)
    world.everywhere(lambda: None)
    return time.perf_counter() - begin


class Team:
    """The processes of one contestant."""

    def __init__(self, workload: Workload, engine: str, num_processes: int, threads: int):
        self.engine, self.num_processes = engine, num_processes
        self._connections, self._processes = [], []
        spawn = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(num_processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, workload, engine, threads), daemon=True)
            with _environment(rank, num_processes, port):
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def ask(self, what: str, count: int = 0) -> list[Any]:
        """What every process answers, by rank; RuntimeError if one failed."""
        for connection in self._connections:
            with contextlib.suppress(OSError):  # why it ended is in its last answer
                connection.send((what, count))
        answers = []
        for rank, connection in enumerate(self._connections):
            try:
                answers.append(connection.recv())
            except (EOFError, OSError):
                answers.append(RuntimeError("it ended without a word"))
            if isinstance(answers[-1], Exception):
                raise RuntimeError(f"{self.engine}, rank {rank} of {self.num_processes}: {answers[-1]}")
        return answers

    def close(self) -> None:
        """End the processes."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(10)
            process.kill()


@contextlib.contextmanager
def _environment(rank: int, num_processes: int, port: int) -> Iterator[None]:
    """What torchrun tells a process, for one that starts inside."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1"}
    said |= {"MASTER_PORT": port, "OMP_WAIT_POLICY": "passive"}
    before = {name: os.environ.get(name) for name in said}
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_parity(losses: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """Raise AssertionError unless the losses of all contestants agree with those of the first, step by step."""
    (first, want), *others = losses.items()
    for name, have in others:
        for step, pair in enumerate(zip(have, want, strict=True)):
            if not math.isclose(*pair, rel_tol=tolerance):
                raise AssertionError(f"step {step}: loss {pair[0]} of {name}, but {pair[1]} of {first}")


def contestants(engines: Sequence[str], num_processes: int) -> list[str]:
    """Those of `engines` that there are for so many processes."""
    return [engine for engine in engines if engine != ("ddp" if num_processes == 1 else "plain")]


def measure(
    workload: Workload, engines: Sequence[str], counts: Sequence[int], *, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows ``{engine, processes, images_per_s, peak_mib}``: medians, and the most that one process held."""
    rows, losses = [], {}
    for num_processes in counts:
        share = max(1, threads // num_processes)
        with contextlib.ExitStack() as stack:
            teams = []
            for engine in contestants(engines, num_processes):
                teams.append(Team(workload, engine, num_processes, share))
                stack.callback(teams[-1].close)
            for team in teams:
                answers = team.ask("losses", _PARITY_STEPS)
                losses[f"{team.engine} in {num_processes}"] = [
                    statistics.fmean(each) for each in zip(*answers, strict=True)
                ]
            check_parity(losses, _TOLERANCE[workload.precision])
            seconds = _interleave(teams, repeats)
            for team in teams:
                rate = workload.batch / seconds[team.engine]
                peak = max(team.ask("peak")) / 2**20
                row = {"engine": team.engine, "processes": num_processes}
                rows.append({**row, "images_per_s": round(rate, 2), "peak_mib": round(peak, 1)})
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _interleave(teams: Sequence[Team], repeats: int) -> dict[str, float]:
    """Median seconds of a step of each team. They take turns, and the first of each round changes."""
    steps = {team.engine: max(1, round(_SAMPLE_SECONDS / min(team.ask("time", 1)))) for team in teams}
    samples: dict[str, list[float]] = {team.engine: [] for team in teams}
    for turn in range(repeats):
        for offset in range(len(teams)):
            team = teams[(turn + offset) % len(teams)]
            count = steps[team.engine]
            samples[team.engine].append(max(team.ask("time", count)) / count)
    return {name: statistics.median(times) for name, times in samples.items()}


def estimates() -> list[dict[str, Any]]:
    """Rows ``{network, num_params, gib, host_gib}``: the memory that each engine is expected to take of one of
    `ESTIMATED_PROCESSES` GPUs. bf16; 32 images of 256 tokens each, three quarters of them masked."""
    rows = []
    for name, model in ESTIMATED_NETWORKS.items():
        stage = DenoisingConfig(mask=PatchMask(0.75), batch_size=32 * ESTIMATED_PROCESSES)
        config = RunConfig(model=model, stage=stage, precision="bf16")
        memory = {engine: memory_per_rank(config, engine, ESTIMATED_PROCESSES) for engine in ENGINES[1:-1]}
        rows.append(
            {
                "network": name,
                "num_params": num_parameters(config),
                "gib": {engine: round(found.total / 2**30, 1) for engine, found in memory.items()},
                "host_gib": {engine: round(found.host_total / 2**30, 1) for engine, found in memory.items()},
            }
        )
    return rows


def table(result: Mapping[str, Any]) -> str:
    """`result` for people."""
    lines = [f"{'engine':<15}{'processes':>10}{'images/s':>10}{'of peer':>9}{'peak MiB':>10}"]
    peers = {row["processes"]: row["images_per_s"] for row in result["rows"] if row["engine"] == PEER}
    for row in result["rows"]:
        peer = peers.get(row["processes"])
        ratio = f"{row['images_per_s'] / peer:.2f}x" if peer else "-"
        rate, peak = f"{row['images_per_s']:,.1f}", f"{row['peak_mib']:,.0f}"
        lines.append(f"{row['engine']:<15}{row['processes']:>10}{rate:>10}{ratio:>9}{peak:>10}")
    return "\n".join(lines)


def _counts() -> list[int]:
    """One process, and two of them on the CPU or one per GPU."""
    gpus = len(backend.devices()["cuda"])
    return [1] if gpus == 1 else [1, gpus or 2]


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = harness.command_line("scaling", __doc__, repeats=7)
    parser.add_argument("--size", choices=sorted(CONFIGS), help="a named network instead of the small one")
    parser.add_argument("--batch", type=int, default=WORKLOAD.batch, help="images per step (default: %(default)s)")
    parser.add_argument("--precision", choices=sorted(_TOLERANCE), default=WORKLOAD.precision)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="default: all")
    parser.add_argument("--processes", nargs="+", type=int, default=_counts(), help="default: %(default)s")
    options = harness.prepare(parser, arguments)
    harness.refuse_to_save_a_part(parser, options, "size", "batch", "precision", "engines", "processes")
    if min(options.batch, *options.processes) < 1:
        parser.error("--batch and --processes must be at least 1")
    if any(options.batch % count for count in options.processes):
        parser.error(f"--batch {options.batch} must be a multiple of every number of processes")
    engines = [engine for engine in ENGINES if engine in options.engines]
    if importlib.util.find_spec("deepspeed") is None:
        left_out = [engine for engine in engines if engine.startswith("zero")]
        print(f"deepspeed is not installed; left out: {', '.join(left_out)}", file=sys.stderr)
        engines = [engine for engine in engines if engine not in left_out]
    model = CONFIGS[options.size] if options.size else WORKLOAD.model
    workload = dataclasses.replace(WORKLOAD, model=model, batch=options.batch, precision=options.precision)
    result = harness.environment()
    gpus = result["machine"]["gpus"] = backend.devices()["cuda"]
    result["workload"] = {
        "num_params": num_parameters(workload.config("plain")),
        **dataclasses.asdict(workload),
    }
    result["rows"] = measure(workload, engines, options.processes, threads=options.threads, repeats=options.repeats)
    result["estimates"] = estimates()
    if options.save:
        harness.save(result, "scaling-gpu" if gpus else "scaling")
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
