"""The classes that trained weights know and those of a data set, which are the same where their names are."""

import dataclasses
import sys
from collections.abc import Sequence

import torch

from maskdm_fast.models import UViT
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

_SHOWN = 5


def match_classes(weights: Weights, class_names: Sequence[str], seed: int, world: World) -> Weights:
    """`weights` with an embedding for each of `class_names`: their own of the classes that they know, and of the others
    what a network of this seed begins with. Says so where that changes anything.

    Weights without classes, or whose classes have no names, are left as they are.
    """
    known, wanted = weights.known_names, list(class_names)
    if not known or not wanted or known == wanted:
        return weights
    model = dataclasses.replace(weights.config.model, num_classes=len(wanted))
    name = next(name for name in weights.tensors if name.rpartition(".")[2] == "label_embed")
    with torch.device("meta"):
        fresh = UViT(model).initial_value("label_embed", seed)
    rows = {class_name: row for row, class_name in enumerate(known)}
    kept = [label for label, class_name in enumerate(wanted) if class_name in rows]
    table = fresh.to(weights.tensors[name].dtype)
    table[kept] = weights.tensors[name][[rows[wanted[label]] for label in kept]]
    if world.is_main:
        parts = {
            f"as in {weights.checkpoint.path}": [wanted[label] for label in kept],
            "new": [class_name for class_name in wanted if class_name not in rows],
            "left out": sorted(rows.keys() - set(wanted), key=rows.get),
        }
        words = [f"{len(names)} {what} ({_listed(names)})" for what, names in parts.items() if names]
        print(f"classes by their names: {', '.join(words)}", file=sys.stderr, flush=True)
    config = dataclasses.replace(weights.config, model=model)
    return dataclasses.replace(weights, config=config, tensors={**weights.tensors, name: table})


def check_same_classes(teacher: Weights, class_names: Sequence[str], data: str) -> None:
    """Raise ValueError if a label means one class to the teacher of a run and another in its data set."""
    known = teacher.known_names
    if known and known != list(class_names):
        raise ValueError(
            f"the teacher {teacher.checkpoint.path} knows the classes {_listed(known)}, but the data set {data!r} has "
            f"{_listed(class_names)}: want the same in the same order"
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
