"""The processes that train together: who am I, which samples are mine, and how to agree with the others.

What belongs to training itself (gradients, sharded weights) is the engines' business. Here is only what surrounds it:
small Python objects that travel between the hosts, over a group of processes of their own, so that nothing waits for a
device.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.train.timing import StepTimer

T = TypeVar("T")

# One process may pack a data set for hours while the others wait. One that dies is noticed at once, for its connections
# close; one that hangs in training is ended by its own watchdog.
LAUNCHED_LOCAL_RANK = "MASKDM_FAST_LOCAL_RANK"
"""Environment variable with what the launcher called LOCAL_RANK, if that has been set to something else."""
_PATIENCE = timedelta(days=2)
_control: dist.ProcessGroup | None = None


class PeerError(RuntimeError):
    """Another process failed, and says why itself."""


class LostPeerError(RuntimeError):
    """Another process ended without a word."""


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        device: where this process computes.
        rank: its number, 0 to world_size - 1.
        world_size: how many there are.
        local_rank: its number among those on the same machine.
        timer: splits the time of a step.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    timer: StepTimer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "timer", StepTimer(self.device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def slots(self, batch_size: int) -> Tensor:
        """This process's places in the global batch, int64 on the CPU: ranks own contiguous, equal shares.

        Raises:
            ValueError: the batch cannot be divided evenly.
        """
        share, rest = divmod(batch_size, self.world_size)
        if rest:
            raise ValueError(
                f"batch_size {batch_size} cannot be divided evenly among {self.world_size} processes; want a multiple "
                f"of {self.world_size}, such as {(share + 1) * self.world_size}"
            )
        return torch.arange(self.rank * share, (self.rank + 1) * share)

    def micro_batches(self, batch_size: int, micro_batch_size: int | None) -> list[Tensor]:
        """`slots`, cut into the same number of nearly equal micro-batches in every process, of `micro_batch_size` at
        most; None: one."""
        slots = self.slots(batch_size)
        return list(slots.tensor_split(math.ceil(len(slots) / (micro_batch_size or len(slots)))))

    def everywhere(self, function: Callable[[], T]) -> list[T]:
        """Call `function` in all processes; returns the results by rank, which must be picklable.

        Raises:
            Exception: what `function` raised here.
            PeerError: it raised in another process only.
            LostPeerError: a process has ended.
        """
        if self.world_size == 1:
            return [function()]
        result, error = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        outcomes: list[Any] = [None] * self.world_size
        mine = (result, None if error is None else f"{type(error).__name__}: {error}")
        _talk(lambda: dist.all_gather_object(outcomes, mine, group=_control))
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise PeerError(f"rank {rank}: {problem}")
        return [result for result, _ in outcomes]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process while the others wait; all get its result, which must be picklable.

        Raises:
            Exception: what `function` raised, in the main process; in the others PeerError.
            LostPeerError: a process has ended.
        """
        return self.everywhere(lambda: function() if self.is_main else None)[0]

    def on_each_machine(self, function: Callable[[], T]) -> T:
        """Call `function` in every process, first in one per machine: what it leaves on disk is there for the others.

        Raises:
            As `everywhere`.
        """
        results: list[T] = []  # not handed from process to process: they may be large
        for first in (True, False):
            mine = (self.local_rank == 0) == first
            self.everywhere(lambda mine=mine: results.append(function()) if mine else None)
        return results[0]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of a float tensor; waits for the device. On the CPU, in float64."""
        return self._reduce(values.double(), dist.ReduceOp.SUM) / self.world_size

    def smallest(self, values: Tensor) -> Tensor:
        """Minimum over the processes of an integer tensor; waits for the device. On the CPU."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def largest(self, value: int) -> int:
        """Maximum over the processes of a number."""
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX))

    def _reduce(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        values = values.cpu()
        if self.world_size > 1:
            values = values.clone()
            _talk(lambda: dist.all_reduce(values, operation, group=_control))
        return values


class Vote:
    """Lets all processes stop after the same step, whichever of them has a reason to.

    What a process says before one step is known to all before the next, so that nobody waits: the answers have had a
    step's time to travel.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self._alone = world.world_size == 1
        self._pending: tuple[Tensor, dist.Work] | None = None

    def say(self, code: int) -> int:
        """Hand in a reason, 0 for none; returns the largest of those handed in at the call before (alone: at this)."""
        if self._alone:
            return code
        heard = self.settle()
        ballot = torch.tensor(code)
        work = _talk(lambda: dist.all_reduce(ballot, dist.ReduceOp.MAX, group=_control, async_op=True))
        self._pending = (ballot, work)
        return heard

    def settle(self) -> int:
        """The largest reason of the last call of `say` that was not returned yet; waits for it."""
        if self._pending is None:
            return 0
        ballot, work = self._pending
        _talk(work.wait)
        self._pending = None
        return int(ballot)


def make_world(device: str = "auto") -> World:
    """The world as the launcher of this process describes it; the first call connects the processes.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets
    variables of its own. Without them the world is this process alone.

    Args:
        device: ``auto`` (a GPU if there is one), or a PyTorch device such as ``cpu`` or ``cuda:1``. Of several
            processes on one machine, process i takes GPU i, or the only one that it sees.

    Raises:
        ValueError: the device does not exist here, or the launcher's variables make no sense.
        LostPeerError: the processes cannot reach each other.
    """
    rank, world_size, local_rank = _launched()
    found = _device(device, local_rank if world_size > 1 else None)
    if world_size > 1:
        _connect(found)
    return World(found, rank, world_size, local_rank)


def rank_from_environment() -> tuple[int, int]:
    """``(rank, world_size)`` as the launcher says, without connecting; ``(0, 1)`` where it says nothing sensible."""
    try:
        return _launched()[:2]
    except ValueError:
        return 0, 1


def lost_peer(error: RuntimeError) -> LostPeerError | None:
    """`error` in our words, if it says that the connection to another process broke; else None."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error", "Socket closed")
    if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
        return LostPeerError(f"lost contact with another process, which has ended or is out of reach ({_short(text)})")
    return None


def _talk(action: Callable[[], T]) -> T:
    try:
        return action()
    except RuntimeError as error:
        lost = lost_peer(error)
        if lost is None:
            raise
        raise lost from error


def _short(text: str) -> str:
    """The first line, without the place in PyTorch's sources."""
    return re.sub(r"^\[[^\]]*\]\s*", "", text.strip().splitlines()[0])[:200]


def _launched() -> tuple[int, int, int]:
    """Rank, world size and local rank; puts srun's description into the variables that PyTorch and DeepSpeed read."""
    env = os.environ
    if "RANK" not in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", ""))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        for name, of_slurm in (("WORLD_SIZE", "STEP_NUM_TASKS"), ("LOCAL_RANK", "LOCALID"), ("RANK", "PROCID")):
            env[name] = env.get(f"SLURM_{of_slurm}", "")
    names = ("RANK", "WORLD_SIZE", LAUNCHED_LOCAL_RANK if LAUNCHED_LOCAL_RANK in env else "LOCAL_RANK")
    try:
        rank, world_size, local_rank = (int(env.get(name, default)) for name, default in zip(names, "010", strict=True))
    except ValueError:
        rank = world_size = local_rank = -1
    if not 0 <= local_rank <= rank < world_size:
        said = ", ".join(f"{name}={env.get(name)}" for name in names)
        raise ValueError(f"the launcher's variables make no sense: {said}; start with torchrun, deepspeed or srun")
    return rank, world_size, local_rank


def _first_host(nodes: str) -> str:
    """The first host of a list in SLURM's short form: ``gpu[003-005,9],login1`` begins with ``gpu003``."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)[0]
    if not first:
        raise ValueError(f"SLURM_STEP_NODELIST {nodes!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        found = backend.default_device()
    else:
        try:
            found = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device {name!r} is not known; want auto, cpu, cuda or cuda:INDEX") from None
    if found.type == "cuda":
        count = len(backend.devices()["cuda"])
        if local_rank is not None:
            if found.index is not None:
                raise ValueError(f"device {name!r} names one GPU for all processes; want auto, cpu or cuda")
            # Some schedulers show each process no GPU but its own.
            found = torch.device("cuda", 0 if count == 1 else local_rank)
        if (found.index or 0) >= count:
            raise ValueError(
                f"device {str(found)!r} is not there: PyTorch sees {count} CUDA devices; start fewer processes per "
                "machine, or use --device cpu"
            )
        if found.index is not None:
            backend.set_device(found)
    elif found.type != "cpu":
        raise ValueError(f"device {name!r} is not supported; want auto, cpu, cuda or cuda:INDEX")
    return found


def _connect(device: torch.device) -> None:
    global _control
    if _control is not None:
        return
    try:
        if device.type == "cuda":
            # It would end the process before the watchdog has said where it stands.
            dist.init_process_group("nccl", device_id=device, timeout=_PATIENCE)
        else:
            dist.init_process_group("gloo")
        _control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise LostPeerError(f"cannot connect the processes at {address}: {_short(str(error))}") from error


def disconnect() -> None:
    """Take leave of the other processes, after everything is done."""
    global _control
    if _control is not None:
        _control = None
        dist.destroy_process_group()
