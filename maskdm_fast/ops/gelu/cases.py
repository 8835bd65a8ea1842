"""Inputs of gelu for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.gelu.op import gelu
from maskdm_fast.testing import LAYOUTS, draw, restride

WITH_GRAD = ("x",)
EXACT = False
FIXED_DTYPE = ()


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    scale: float = 1.0
    layout: str = "contiguous"


CASES = (
    Case("plain", (3, 5, 7)),
    Case("no_values", (0, 4)),
    Case("one_value", (1,)),
    Case("whole_vectors", (4, 64)),
    Case("two_chunks", (3, 1999)),
    Case("tails", (6, 50), scale=6.0),  # both ends, where the distribution is 0 or 1
    Case("far", (2, 30), scale=40.0),
    Case("small", (2, 30), scale=1e-3),
    Case("transposed", (3, 5, 7), layout="transposed"),
    Case("sliced", (3, 5, 7), layout="sliced"),
    Case("expanded", (3, 5, 7), layout="expanded"),
)

BENCHMARKS = (
    Case("emoji32 90 %", (128, 8, 768)),
    Case("small64 90 %", (64, 27, 2048)),
    Case("ViT-B/16 90 %", (64, 27, 3072)),
)


def random_case(rng: random.Random) -> Case:
    shape = tuple(rng.randint(1, 30) for _ in range(rng.randint(1, 4)))
    return Case("random", shape, scale=rng.choice([0.1, 1.0, 4.0]), layout=rng.choice(LAYOUTS))


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    return {"x": restride(draw(case.shape, dtype, device, seed) * case.scale, case.layout)}


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return {"out": gelu(**inputs, backend=backend)}
