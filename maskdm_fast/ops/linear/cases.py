"""Inputs of linear for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.linear.op import linear
from maskdm_fast.testing import LAYOUTS, draw, restride

WITH_GRAD = ("x", "weight", "bias", "residual")
EXACT = False
FIXED_DTYPE = ()


@dataclass(frozen=True)
class Case:
    name: str
    rows: tuple[int, ...]  # all sizes of x but the last
    fan_in: int
    fan_out: int
    bias: bool = True
    residual: bool = False
    layout: str = "contiguous"


CASES = (
    Case("plain", (3, 5), 12, 7),
    Case("no_bias", (3, 5), 12, 20, bias=False),
    Case("residual", (2, 9), 8, 8, residual=True),
    Case("residual_no_bias", (4,), 6, 10, bias=False, residual=True),
    Case("one_row", (1,), 3, 1),
    Case("no_rows", (0, 4), 5, 6, residual=True),
    Case("whole_vectors", (48,), 32, 16),
    Case("ragged_vectors", (53,), 37, 41, residual=True),
    Case("many_rows", (2, 300), 20, 19),
    Case("wider_out", (2, 40), 16, 64),
    Case("transposed", (3, 5), 12, 7, residual=True, layout="transposed"),
    Case("sliced", (3, 5), 12, 7, residual=True, layout="sliced"),
    Case("expanded", (3, 5), 12, 7, residual=True, layout="expanded"),
)

BENCHMARKS = (
    Case("small64 qkv 90 %", (64, 27), 512, 1536, bias=False),
    Case("small64 fc1 90 %", (64, 27), 512, 2048),
    Case("small64 fc2 90 %", (64, 27), 2048, 512, residual=True),
    Case("emoji32 fc1 90 %", (128, 8), 192, 768),
    Case("emoji32 fc2 90 %", (128, 8), 768, 192, residual=True),
    Case("ViT-B/16 fc2 90 %", (64, 27), 3072, 768, residual=True),
)


def random_case(rng: random.Random) -> Case:
    rows = tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 3)))
    return Case(
        "random",
        rows if len(rows) < 3 else (*rows[:2], 2),
        rng.randint(1, 80),
        rng.randint(1, 80),
        bias=rng.random() < 0.5,
        residual=rng.random() < 0.5,
        layout=rng.choice(LAYOUTS),
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    shapes = {
        "x": (*case.rows, case.fan_in),
        "weight": (case.fan_out, case.fan_in),
        "bias": (case.fan_out,) if case.bias else None,
        "residual": (*case.rows, case.fan_out) if case.residual else None,
    }
    return {
        name: None if shape is None else restride(draw(shape, dtype, device, seed + index), case.layout)
        for index, (name, shape) in enumerate(shapes.items())
    }


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return {"out": linear(**inputs, backend=backend)}
