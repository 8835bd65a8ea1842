"""Inputs of masked_dsm_loss for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.masked_dsm_loss.op import masked_dsm_loss
from maskdm_fast.testing import LAYOUTS, draw, restride

WITH_GRAD = ("pred", "target", "weight")
EXACT = False
FIXED_DTYPE = ()


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]  # tokens of each image
    width: int
    kind: str = "mse"
    weighted: bool = True
    packed: bool = False
    reduction: str = "mean"
    layout: str = "contiguous"


CASES = (
    Case("mse", (5, 5, 5), 12),
    Case("unweighted", (5, 5, 5), 12, weighted=False),
    Case("l1", (5, 5, 5), 12, kind="l1"),
    Case("huber", (5, 5, 5), 12, kind="huber"),
    Case("none", (5, 5, 5), 12, reduction="none"),
    Case("none_huber", (4, 4), 7, kind="huber", reduction="none"),
    Case("no_images", (), 12, reduction="none"),
    Case("one_value", (1,), 1),
    Case("long", (300, 300), 48),  # more values than one partial sum holds
    Case("packed", (3, 0, 11, 1), 12, packed=True),
    Case("packed_none", (3, 0, 11, 1), 12, packed=True, reduction="none"),
    Case("packed_l1", (2, 5), 3, packed=True, kind="l1", weighted=False),
    Case("transposed", (5, 5, 5), 12, layout="transposed"),
    Case("sliced", (5, 5, 5), 12, layout="sliced"),
    Case("expanded", (5, 5, 5), 12, layout="expanded"),
)

BENCHMARKS = (
    Case("small64 26 tokens", (26,) * 64, 48),
    Case("base256 410 tokens", (410,) * 4, 48),
    Case("ViT-B/16 26 tokens", (26,) * 64, 768),
)


def random_case(rng: random.Random) -> Case:
    packed = rng.random() < 0.5
    length = rng.randint(1, 40)
    num_images = rng.randint(1, 5)
    return Case(
        "random",
        tuple(rng.randint(0, 40) if packed else length for _ in range(num_images)),
        rng.randint(1, 60),
        kind=rng.choice(["mse", "l1", "huber"]),
        weighted=rng.random() < 0.5,
        packed=packed,
        reduction=rng.choice(["mean", "none"]),
        layout=rng.choice(LAYOUTS),
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    num_images = len(case.lengths)
    shape: tuple[int, ...] = (num_images, case.lengths[0] if case.lengths else 4, case.width)
    cu_seqlens = None
    if case.packed:
        shape = (sum(case.lengths), case.width)
        ends = torch.tensor(case.lengths, dtype=torch.int64).cumsum(0).tolist()
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "pred": restride(draw(shape, dtype, device, seed), case.layout),
        "target": restride(draw(shape, dtype, device, seed + 1), case.layout),
        "weight": draw((num_images,), weight_dtype, device, seed + 2) if case.weighted else None,
        "cu_seqlens": cu_seqlens,
        "kind": case.kind,
        "delta": 0.7,
        "reduction": case.reduction,
    }


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return {"loss": masked_dsm_loss(**inputs, backend=backend)}
