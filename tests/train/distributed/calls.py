"""What processes do together in test_world.py; the functions run in each of them."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
