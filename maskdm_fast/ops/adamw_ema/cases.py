"""Inputs of adamw_ema for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.adamw_ema.op import adamw_ema, global_norm
from maskdm_fast.ops.checks import accumulate_dtype
from maskdm_fast.testing import draw, restride

WITH_GRAD = ()
EXACT = False
FIXED_DTYPE = ("copies", "grad_scale", "lr", "step", "ema_decay", "found_inf")


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[tuple[int, ...], ...]
    step: int = 3
    weight_decay: float = 0.1
    clipped: bool = True
    copy: str | None = None  # "float16" or "bfloat16"
    grad_layout: str = "contiguous"
    in_memory: bool = False  # lr, step and ema_decay as scalar tensors
    found_inf: float | None = None
    first_moment: bool = True  # without, beta1 is 0
    average: bool = True


CASES = (
    Case("plain", ((3, 5), (7,), (1,))),
    Case("first_step", ((3, 5),), step=1),
    Case("no_decay_no_clip", ((3, 5), (2, 2)), weight_decay=0.0, clipped=False),
    Case("bfloat16_copy", ((33, 5), (1100,)), copy="bfloat16"),
    Case("float16_copy", ((33, 5), (7,)), copy="float16"),
    Case("empty_tensor", ((0,), (5,))),
    Case("several_chunks", ((70_001,),)),
    Case("transposed_grad", ((9, 5),), grad_layout="transposed"),
    Case("sliced_grad", ((9, 5), (7,)), grad_layout="sliced"),
    Case("expanded_grad", ((9, 5), (7,)), grad_layout="expanded"),
    Case("in_memory", ((3, 5), (7,)), in_memory=True),
    Case("in_memory_first_step", ((33, 5),), step=1, clipped=False, copy="bfloat16", in_memory=True),
    Case("in_memory_late_step", ((9, 5),), step=100_000, in_memory=True),
    Case("finite", ((3, 5), (7,)), copy="float16", found_inf=0.0),
    Case("skipped", ((33, 5), (1100,)), copy="bfloat16", found_inf=1.0),
    Case("skipped_first_step", ((33, 5),), step=0, in_memory=True, found_inf=1.0),
    Case("no_first_moment", ((33, 5), (1100,)), copy="bfloat16", first_moment=False),
    Case("no_average", ((33, 5), (1100,)), copy="float16", average=False),
    Case("no_slot_but_one", ((33, 5), (0,), (1100,)), first_moment=False, average=False),
    Case("no_slot_in_memory", ((9, 5),), in_memory=True, found_inf=0.0, first_moment=False, average=False),
    Case("no_slot_skipped", ((9, 5),), copy="bfloat16", found_inf=1.0, first_moment=False, average=False),
)


def _uvit_shapes(dim: int, num_blocks: int, num_tokens: int, values: int) -> tuple[tuple[int, ...], ...]:
    block = ((dim,), (dim,), (3 * dim, dim), (dim, dim), (dim,), (dim,), (dim,), (4 * dim, dim), (4 * dim,))
    block += ((dim, 4 * dim), (dim,))
    skip = ((dim, dim), (dim, dim), (dim,))
    ends = ((dim, values), (dim,), (1 + num_tokens, dim), (dim,), (dim,), (values, dim), (values,))
    return block * num_blocks + skip * (num_blocks // 2) + ends


BENCHMARKS = (
    Case("small64 44.3 M", _uvit_shapes(512, 13, 256, 48)),
    Case("demo 3.4 M", _uvit_shapes(192, 7, 64, 48)),
)


def random_case(rng: random.Random) -> Case:
    return Case(
        "random",
        tuple(tuple(rng.randint(1, 30) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 4))),
        step=rng.randint(1, 1000),
        weight_decay=rng.choice([0.0, 0.03]),
        clipped=rng.random() < 0.5,
        copy=rng.choice([None, "float16", "bfloat16"]),
        in_memory=rng.random() < 0.3,
        found_inf=rng.choice([None, None, 0.0, 1.0]),
        first_moment=rng.random() < 0.7,
        average=rng.random() < 0.7,
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    state = accumulate_dtype(dtype)

    def tensors(offset: int, dtype: torch.dtype) -> list[Tensor]:
        return [draw(shape, dtype, device, seed + 100 * offset + i) for i, shape in enumerate(case.shapes)]

    def number(value: float, dtype: torch.dtype) -> float | Tensor:
        return torch.tensor(value, dtype=dtype, device=device) if case.in_memory else value

    params = tensors(0, dtype)
    return {
        "params": params,
        "grads": [restride(grad, case.grad_layout) for grad in tensors(1, dtype)],
        "exp_avgs": tensors(2, state) if case.first_moment else None,
        "exp_avg_sqs": [value.square() for value in tensors(3, state)],
        "emas": tensors(4, state) if case.average else None,
        "copies": [] if case.copy is None else [param.to(getattr(torch, case.copy)) for param in params],
        "lr": number(0.01, torch.float32),
        "betas": (0.9 if case.first_moment else 0.0, 0.99),
        "eps": 1e-8,
        "weight_decay": case.weight_decay,
        "step": number(case.step, torch.int64),
        "ema_decay": number(0.9, torch.float64) if case.average else None,
        "grad_scale": torch.tensor(0.3, device=device) if case.clipped else None,
        "found_inf": None if case.found_inf is None else torch.tensor(case.found_inf, device=device),
    }


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    norm = global_norm(inputs["grads"], backend=backend)
    adamw_ema(**inputs, backend=backend)
    written = ("params", "exp_avgs", "exp_avg_sqs", "emas", "copies")
    return {"norm": norm} | {f"{name}[{i}]": tensor for name in written for i, tensor in enumerate(inputs[name] or ())}
