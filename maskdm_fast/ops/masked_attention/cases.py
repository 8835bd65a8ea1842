"""Inputs of masked_attention for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.masked_attention.op import masked_attention
from maskdm_fast.testing import LAYOUTS, draw, restride

WITH_GRAD = ("qkv", "k", "v")
EXACT = False
FIXED_DTYPE = ()


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]  # tokens of each image; unequal lengths make the packed form
    num_heads: int
    head_dim: int
    separate: bool = False  # q, k and v as three tensors
    packed: bool = False
    scale: float | None = None
    layout: str = "contiguous"


CASES = (
    Case("plain", (7, 7), 2, 16),
    Case("no_images", (), 2, 16),
    Case("one_token", (1, 1, 1), 2, 8),
    Case("separate", (5, 5), 3, 8, separate=True),
    Case("odd_sizes", (13, 13), 3, 5),
    Case("wide_head", (6,), 1, 128),
    Case("visible_27", (27, 27), 2, 64),
    Case("two_row_blocks", (130,), 1, 16),
    Case("three_row_blocks", (193,), 1, 24),
    Case("sharp", (9, 9), 2, 16, scale=5.0),
    Case("transposed", (7, 7), 2, 16, layout="transposed"),
    Case("sliced", (7, 7), 2, 16, layout="sliced"),
    Case("expanded", (7, 7), 2, 16, separate=True, layout="expanded"),
    Case("packed", (3, 0, 11, 1), 2, 16, packed=True),
    Case("packed_separate", (5, 120, 2), 2, 8, packed=True, separate=True),
    Case("packed_sliced", (4, 6), 2, 8, packed=True, layout="sliced"),
    Case("packed_no_images", (), 2, 8, packed=True),
)

BENCHMARKS = (
    Case("small64 27 tokens", (27,) * 64, 8, 64),
    Case("small64 29 tokens", (29,) * 64, 8, 64),
    Case("small64 65 tokens", (65,) * 32, 8, 64),
    Case("ViT-B/16 27 tokens", (27,) * 64, 12, 64),
    Case("ViT-B/8 104 tokens", (104,) * 16, 12, 64),
    Case("small64 257 tokens", (257,) * 8, 8, 64),
    Case("base256 417 tokens", (417,) * 4, 12, 64),
)


def random_case(rng: random.Random) -> Case:
    packed = rng.random() < 0.5
    length = rng.randint(1, 110)
    num_images = rng.randint(0, 3)
    lengths = tuple(rng.randint(0, 40) if packed else length for _ in range(num_images))
    return Case(
        "random",
        lengths,
        rng.randint(1, 3),
        rng.randint(1, 40),
        separate=rng.random() < 0.5,
        packed=packed,
        layout=rng.choice(LAYOUTS),
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    tokens: tuple[int, ...] = (len(case.lengths), case.lengths[0] if case.lengths else 4)
    cu_seqlens = None
    if case.packed:
        tokens = (sum(case.lengths),)
        ends = torch.tensor(case.lengths, dtype=torch.int64).cumsum(0).tolist()
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    heads = (case.num_heads, case.head_dim)
    inputs = {"qkv": None, "k": None, "v": None, "cu_seqlens": cu_seqlens, "scale": case.scale}
    if case.separate:
        for index, name in enumerate(("qkv", "k", "v")):
            inputs[name] = restride(draw((*tokens, *heads), dtype, device, seed + index), case.layout)
    else:
        inputs["qkv"] = restride(draw((*tokens, 3, *heads), dtype, device, seed), case.layout)
    return inputs


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return {"o": masked_attention(**inputs, backend=backend)}
