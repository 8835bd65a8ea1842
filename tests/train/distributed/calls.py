"""What processes do together in test_world.py and test_optimizers.py; the functions run in each of them."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskdm_fast.testing import draw
from maskdm_fast.train.engine import Engine, EngineSettings, OptimizerSettings, make_engine
from maskdm_fast.train.idle import IdleState
from maskdm_fast.train.pieces import FileReader, file_name, group_of, write_pieces
from maskdm_fast.train.world import Vote, make_world


def told(action: Callable[[], Any]) -> str:
    """Type and message of what `action` raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def agree(folder: str, machines: int) -> dict[str, Any]:
    """What every way to agree gives, without and with an error in one of the processes."""
    world = make_world("cpu")
    rank = world.rank

    def fail_in(who: int) -> int:
        if rank == who:
            raise FileNotFoundError(f"nothing for {who}")
        return 10 + rank

    def meet_on_disk() -> list[str]:
        """Leave a note; the notes that were there before. On two machines the first process waits for the second."""
        deadline = time.monotonic() + 30
        while machines == 2 and rank == 0 and not Path(folder, "1").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        found = sorted(path.name for path in Path(folder).iterdir())
        Path(folder, str(rank)).touch()
        return found

    return {
        "world": [rank, world.world_size, world.local_rank, world.is_main, str(world.device)],
        "again": make_world("cpu") == world,
        "slots": world.slots(6).tolist(),
        "micro_batches": [slots.tolist() for slots in world.micro_batches(6, 2)],
        "everywhere": world.everywhere(lambda: {"rank": rank}),
        "on_main": world.on_main(lambda: rank),
        "errors": [
            *(told(lambda who=who: world.everywhere(lambda: fail_in(who))) for who in (0, 1)),
            *(told(lambda who=who: world.on_main(lambda: fail_in(who))) for who in (0, 1)),
            *(told(lambda who=who: world.on_each_machine(lambda: fail_in(who))) for who in (0, 1)),
        ],
        "on_each_machine": world.on_each_machine(meet_on_disk),
        "mean": world.mean(torch.tensor([1.0 + rank, 1e-9], dtype=torch.float32)).tolist(),
        "smallest": world.smallest(torch.tensor([5 - rank, 3 + rank])).tolist(),
    }


def vote(ballots: list[list[int]]) -> list[int]:
    """What the processes hear when process r says ``ballots[r]`` one after the other, and what is left at the end."""
    world = make_world("cpu")
    box = Vote(world)
    heard = [box.say(code) for code in ballots[world.rank]]
    return [*heard, box.settle(), box.settle()]


def lose(who: int) -> str:
    """What the others are told when process `who` ends while all want to agree."""
    world = make_world("cpu")
    world.everywhere(lambda: None)
    if world.rank == who:
        os._exit(3)
    return told(lambda: world.everywhere(lambda: None))


def meet() -> str:
    """What a process is told whose peers never come."""
    return told(lambda: make_world("cpu"))


class _Lines(nn.Module):
    """35 + 7 + 7 + 21 + 3 parameters, which two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(5, 7), nn.Linear(7, 3), nn.Parameter(torch.ones(7))
        with torch.no_grad():
            for seed, weight in enumerate(self.parameters()):
                weight.copy_(draw(tuple(weight.shape), torch.float32, "cpu", seed))

    def forward(self, x: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        """The gradient of `gain` has `bad` added to it, and no other gradient knows of it."""
        x = x.to(self.gain.dtype)
        return self.second(self.first(x) * self.gain).float().square().mean() + (self.gain * bad).sum()


def train_engine(
    engine: str,
    optimizer: dict[str, Any],
    steps: tuple[int, int],
    folder: str | None = None,
    num_micro: int = 1,
    precision: str = "fp32",
    bad: bool = False,
    rests: bool = False,
) -> dict[str, Any]:
    """Train a small network for a range of steps, after those that are in the folder, and leave what it has there.

    Args:
        engine, optimizer, num_micro, precision: name and settings of the engine.
        bad: gradients of one process have values in them that are not finite, or large.
        rests: the network rests after every step, as on a GPU.
    """
    world = make_world("cpu")
    settings = OptimizerSettings(**{"betas": (0.9, 0.99), "weight_decay": 0.01, "max_grad_norm": None, **optimizer})
    trained = make_engine(engine, _Lines(), settings, EngineSettings(precision, num_micro), world)
    if rests:
        trained._idle = IdleState(trained._optimizer, world.device, moves=True)
        trained.rest()
    if folder is not None and steps[0]:
        files: dict[str, list[Path]] = {}
        for path in sorted(Path(folder).iterdir()):
            files.setdefault(group_of(path.name), []).append(path)
        trained.load(FileReader(files))
        world.everywhere(lambda: None)  # all have read what the first of them will write over
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e6, -1e6, 0.0, 0.0])
    norms = []
    for step in range(*steps):
        slots = world.slots(4).tensor_split(num_micro)
        for number, part in enumerate(slots, start=1):
            x = draw((4, 5), torch.float32, "cpu", seed=10 + step)[part]
            is_bad = bad and step % 2 == 0 and number == 1 and world.rank == world.world_size - 1
            with trained.micro_batch(last=number == num_micro), trained.autocast():
                loss = trained.model(x, values if is_bad else torch.zeros(7))
                trained.backward(loss / num_micro)
        norms.append(float(trained.step(0.05)["grad_norm"]))
        if rests:
            trained.rest()
            assert trained._idle.resting
    return {"norms": norms, **_what_is_there(trained, world, folder)}


def _what_is_there(engine: Engine, world: Any, folder: str | None) -> dict[str, Any]:
    pieces = engine.pieces()
    if folder is not None:
        world.on_main(lambda: [path.unlink() for path in Path(folder).iterdir()])
        for group, tensors in pieces.items():
            write_pieces(Path(folder, file_name(group, world.rank, world.world_size)), tensors)
    slots = {name.split(".")[0] for name in pieces["optimizer"]}
    try:
        averaged = {name: value.tolist() for name, value in engine.averaged().items()}
    except RuntimeError as error:
        averaged = str(error)
    return {"groups": sorted(pieces), "slots": sorted(slots), "averaged": averaged}
