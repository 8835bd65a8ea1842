"""Inputs of gather_tokens and scatter_tokens for tests and benchmarks; one call runs both."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.gather_tokens.op import gather_tokens, scatter_tokens
from maskdm_fast.testing import LAYOUTS, draw, draw_ids, draw_packed_ids, restride

WITH_GRAD = ("x", "base")
EXACT = True
FIXED_DTYPE = ()


@dataclass(frozen=True)
class Case:
    name: str
    num_images: int
    num_tokens: int
    num_visible: int
    width: int
    packed: bool = False  # image b then keeps (num_visible + b) % (num_tokens + 1) tokens
    layout: str = "contiguous"


CASES = (
    Case("plain", 3, 16, 5, 8),
    Case("no_images", 0, 16, 5, 8),
    Case("one_visible", 2, 9, 1, 3),
    Case("all_visible", 2, 9, 9, 7),
    Case("none_visible", 2, 9, 0, 7),
    Case("transposed", 3, 16, 5, 8, layout="transposed"),
    Case("sliced", 3, 16, 5, 8, layout="sliced"),
    Case("expanded", 3, 16, 5, 8, layout="expanded"),
    Case("packed", 4, 9, 8, 5, packed=True),
    Case("packed_sliced", 4, 9, 7, 5, packed=True, layout="sliced"),
    Case("packed_no_images", 0, 9, 7, 5, packed=True),
)

BENCHMARKS = (
    Case("small64 26 of 256", 64, 256, 26, 512),
    Case("base256 410 of 4096", 4, 4096, 410, 768),
    Case("ViT-B/16 26 of 256", 64, 256, 26, 768),
)


def random_case(rng: random.Random) -> Case:
    num_tokens = rng.randint(1, 40)
    return Case(
        "random",
        rng.randint(0, 5),
        num_tokens,
        rng.randint(0, num_tokens),
        rng.randint(1, 40),
        packed=rng.random() < 0.5,
        layout=rng.choice(LAYOUTS),
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    shape = (case.num_images, case.num_tokens, case.width)
    ids_keep = draw_ids(case.num_images, case.num_visible, case.num_tokens, device, seed)
    cu_seqlens = None
    if case.packed:
        counts = [(case.num_visible + image) % (case.num_tokens + 1) for image in range(case.num_images)]
        ids_keep, cu_seqlens = draw_packed_ids(counts, case.num_tokens, device, seed)
    return {
        "x": restride(draw(shape, dtype, device, seed), case.layout),
        "base": restride(draw(shape, dtype, device, seed + 1), case.layout),
        "ids_keep": ids_keep,
        "cu_seqlens": cu_seqlens,
    }


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    x, ids_keep, cu_seqlens = inputs["x"], inputs["ids_keep"], inputs["cu_seqlens"]
    gathered = gather_tokens(x, ids_keep, cu_seqlens, backend=backend)
    return {
        "gathered": gathered,
        "scattered": scatter_tokens(gathered, ids_keep, x.shape[1], cu_seqlens=cu_seqlens, backend=backend),
        "scattered_on_base": scatter_tokens(
            gathered, ids_keep, x.shape[1], inputs["base"], cu_seqlens, backend=backend
        ),
    }
