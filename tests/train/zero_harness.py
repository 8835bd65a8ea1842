"""Steps of a stage under zero1 in a process on its own, in which DeepSpeed leaves things behind.

    python zero_harness.py RESULTS CONFIG ...

CONFIG is a configuration as JSON, its engine plain. RESULTS becomes a file of torch with, for each: what two steps log,
the first under zero1 and the second under plain, which goes on from the pieces of the first; and the pieces after each,
by group and name.
"""

import json
import sys
from dataclasses import replace

import torch
from by_hand import build, take_steps

from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.pieces import Fragment, Held
from maskdm_fast.train.stages import Stage


def whole(stage: Stage) -> dict[str, dict[str, torch.Tensor]]:
    """A copy of the pieces of a process on its own, in which all fragments are whole."""

    def copy(piece: torch.Tensor | Fragment) -> torch.Tensor:
        return piece.values.clone().view(piece.shape) if isinstance(piece, Fragment) else piece.clone()

    return {group: {name: copy(piece) for name, piece in part.items()} for group, part in stage.pieces().items()}


def take_two(config: RunConfig) -> tuple[list[dict], dict, dict]:
    """See above."""
    divided = replace(config, machine=replace(config.machine, engine="zero1"))
    first, second = build(divided), build(config)
    rows = take_steps(first, divided, 0, 1)
    between = whole(first)
    second.load(Held(between))
    rows += take_steps(second, config, 1, 2)
    first.close()
    return rows, between, whole(second)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save([take_two(RunConfig.from_dict(json.loads(text))) for text in sys.argv[2:]], sys.argv[1])
