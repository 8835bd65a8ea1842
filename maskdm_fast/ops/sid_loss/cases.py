"""Inputs of sid_loss for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.sid_loss.op import sid_loss
from maskdm_fast.testing import LAYOUTS, draw, restride

WITH_GRAD = ("generated", "teacher", "fake", "weight")
EXACT = False
FIXED_DTYPE = ()
_IMAGES = ("generated", "teacher", "fake")


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # [B, ...]
    weighting: str = "l1"
    alpha: float = 1.2
    weighted: bool = True
    levels: bool = True  # alpha_t is given
    bad: tuple[float, ...] = ()  # what image i holds in a place of the tensor i % 3
    layout: str = "contiguous"
    reduction: str = "mean"


_NAN, _INF = float("nan"), float("inf")

CASES = (
    Case("l1", (3, 5, 12)),
    Case("unweighted", (3, 5, 12), weighted=False),
    Case("l1_xt", (3, 5, 12), weighting="l1_xt"),
    Case("karras", (3, 5, 12), weighting="karras"),
    Case("weighting_none", (3, 5, 12), weighting="none", weighted=False),
    Case("none", (3, 4, 6), weighting="none", alpha=0.5, reduction="none"),
    Case("none_l1", (4, 7), alpha=1.0, reduction="none"),
    Case("no_images", (0, 5, 12), weighting="l1_xt", reduction="none"),
    Case("one_value", (1, 1), weighting="none"),
    Case("edm", (2, 3, 4, 4), weighting="l1_xt", levels=False),
    Case("long", (2, 3, 64, 48), reduction="none"),  # more values than one partial sum holds
    Case("not_finite", (6, 3, 7), bad=(_NAN, _INF, -_INF, 0.0, _NAN, _NAN)),
    Case("not_finite_none", (4, 3, 7), weighting="none", bad=(_INF, _NAN, _INF), reduction="none"),
    Case("transposed", (3, 5, 12), layout="transposed", weighting="l1_xt"),
    Case("sliced", (3, 5, 12), layout="sliced", weighting="l1_xt"),
    Case("expanded", (3, 5, 12), layout="expanded", weighting="karras"),
)

BENCHMARKS = (
    Case("CIFAR-10 64", (64, 3, 32, 32), weighted=False),
    Case("64 x 64 64", (64, 256, 48), weighted=False),
    Case("latents 32 x 32 64", (64, 4, 32, 32), weighted=False),
)


def random_case(rng: random.Random) -> Case:
    num_images = rng.randint(1, 5)
    return Case(
        "random",
        (num_images, *(rng.randint(1, 20) for _ in range(rng.randint(1, 3)))),
        weighting=rng.choice(["l1", "l1_xt", "karras", "none"]),
        alpha=rng.choice([0.0, 0.5, 1.0, 1.2]),
        weighted=rng.random() < 0.5,
        levels=rng.random() < 0.7,
        bad=tuple(rng.choice([0.0, 0.0, _NAN, _INF]) for _ in range(num_images)),
        layout=rng.choice(LAYOUTS),
        reduction=rng.choice(["mean", "none"]),
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    num_images, wide = case.shape[0], torch.float64 if dtype == torch.float64 else torch.float32
    images = {name: draw(case.shape, dtype, device, seed + i) for i, name in enumerate((*_IMAGES, "xt"))}
    for image, value in enumerate(case.bad):
        values = images[_IMAGES[image % 3]][image].view(-1)
        values[image % len(values)] += value
    levels = {
        name: draw((num_images,), wide, device, seed + i).abs() + 0.1 for i, name in ((5, "alpha_t"), (6, "sigma_t"))
    }
    return {
        **{name: restride(tensor, case.layout) for name, tensor in images.items()},
        "weight": draw((num_images,), wide, device, seed + 4) if case.weighted else None,
        "alpha": case.alpha,
        "weighting": case.weighting,
        "alpha_t": levels["alpha_t"] if case.levels else None,
        "sigma_t": levels["sigma_t"],
        "reduction": case.reduction,
    }


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return {"loss": sid_loss(**inputs, backend=backend)}
