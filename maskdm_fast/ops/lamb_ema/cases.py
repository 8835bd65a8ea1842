"""Inputs of lamb_ema for tests and benchmarks: those of adamw_ema, and what only LAMB tells apart."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.adamw_ema import cases as adamw_cases
from maskdm_fast.ops.lamb_ema.op import lamb_ema

WITH_GRAD = adamw_cases.WITH_GRAD
EXACT = adamw_cases.EXACT
FIXED_DTYPE = adamw_cases.FIXED_DTYPE


@dataclass(frozen=True)
class Case(adamw_cases.Case):
    min_ndim: int = 0
    zeros: str | None = None  # "params"; "all": of gradients and moments as well, so that r is 0


def _of_adamw(case: adamw_cases.Case, **changes: Any) -> Case:
    return Case(**vars(case), **changes)


CASES = (
    *(_of_adamw(case) for case in adamw_cases.CASES if case.first_moment and case.average),
    Case("not_adapted", ((3, 5), (7,), (2, 2, 2)), min_ndim=2),
    Case("zero_params", ((3, 5), (7,)), zeros="params"),
    Case("zero_update", ((3, 5), (7,)), weight_decay=0.0, zeros="all"),
)
BENCHMARKS = tuple(_of_adamw(case, min_ndim=2) for case in adamw_cases.BENCHMARKS)


def random_case(rng: random.Random) -> Case:
    case = _of_adamw(adamw_cases.random_case(rng), min_ndim=rng.randint(0, 3))
    return dataclasses.replace(case, zeros=rng.choice([None, None, None, "params"]), first_moment=True, average=True)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    inputs = adamw_cases.make_inputs(case, dtype, device, seed) | {"min_ndim": case.min_ndim}
    names = {None: (), "params": ("params",), "all": ("params", "grads", "exp_avgs")}[case.zeros]
    for name in names:
        inputs[name] = [torch.zeros_like(tensor) for tensor in inputs[name]]
    return inputs


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    lamb_ema(**inputs, backend=backend)
    written = ("params", "exp_avgs", "exp_avg_sqs", "emas", "copies")
    return {f"{name}[{i}]": tensor for name in written for i, tensor in enumerate(inputs[name])}
