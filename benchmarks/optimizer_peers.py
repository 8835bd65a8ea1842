"""The optimizer steps beside plain PyTorch's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.tasks import HERE, Function, Outputs, Place, Task
from maskdm_fast import optim
from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema import cost as adamw_cost
from maskdm_fast.ops.lamb_ema import cost as lamb_cost
from maskdm_fast.ops.work import FLOAT, Work

_LR, _BETAS, _EPS, _DECAY, _EMA_DECAY, _MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.03, 0.999, 1.0


class _Problem:
    """Where every function begins, with parameters and a state of its own."""

    def __init__(self, case: Any, place: Place) -> None:
        generator = torch.Generator().manual_seed(0)
        self.start = [torch.randn(shape, generator=generator).to(place.device) for shape in case.shapes]
        self._grads = [torch.randn(shape, generator=generator).to(place.device) for shape in case.shapes]
        self.count = sum(value.numel() for value in self.start)

    def parameters(self) -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(value.clone()) for value in self.start]
        for param, grad in zip(params, self._grads, strict=True):
            param.grad = grad.clone()
        return params

    def ours(self, kind: type[optim.AdamWEMA] | type[optim.LambEMA], **options: Any) -> Function:
        params = self.parameters()
        optimizer = kind(params, _LR, _BETAS, _EPS, _DECAY, _EMA_DECAY, max_grad_norm=_MAX_NORM, **options)

        def step() -> Outputs:
            optimizer.step()
            return (*params, *optimizer.ema_parameters())

        return step

    def task(
        self,
        op: str,
        case: Any,
        work: Work,
        fresh: Callable[[], Function],
        others: dict[str, Function],
        compiled: dict[str, Callable[[], Function]],
    ) -> Task:
        # Every function owns its state, so the k-th call of one is compared with the k-th call of another.
        first: dict[Function, Outputs] = {}

        def check(function: Function) -> Outputs:
            if function not in first:
                first[function] = tuple(value.detach().clone() for value in function())
            return first[function]

        return Task(
            op,
            case.name,
            work,
            fresh(),
            others,
            run=lambda function: function(),
            check=check,
            compiled=lambda name: compiled[name](),
            to_compile=tuple(compiled),
            fresh=fresh,
        )


def _compilable_update(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, ema: Tensor, scale: Tensor, step_size: Tensor, bias2: Tensor,
    ema_rate: Tensor,
) -> None:  # fmt: skip
    g = grad * scale
    first = m.lerp(g, 1 - _BETAS[0])
    second = v * _BETAS[1] + (1 - _BETAS[1]) * g * g
    new = param * (1 - _LR * _DECAY) - step_size * first / (second.sqrt() / bias2 + _EPS)
    m.copy_(first)
    v.copy_(second)
    ema.copy_(ema.lerp(new, ema_rate))
    param.copy_(new)


def adamw_ema(case: Any, place: Place = HERE) -> Iterator[Task]:
    """AdamWEMA beside AdamW(fused) with clipping and a moving average, and beside one compiled kernel per tensor."""
    problem = _Problem(case, place)

    def fused() -> Function:
        params = problem.parameters()
        optimizer = torch.optim.AdamW(params, _LR, _BETAS, _EPS, _DECAY, fused=True)
        emas = [param.detach().clone() for param in params]
        count = 0

        @torch.no_grad()
        def step() -> Outputs:
            nonlocal count
            count += 1
            torch.nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=True)
            optimizer.step()
            torch._foreach_lerp_(emas, params, 1.0 - optim.ema_decay_at(count, _EMA_DECAY))
            return (*params, *emas)

        return step

    def one_kernel() -> Function:
        """All passes but the norm's in one kernel, compiled once for every length and called per tensor."""
        update = torch.compile(_compilable_update, fullgraph=True, dynamic=True)
        params = problem.parameters()
        emas = [value.clone() for value in problem.start]
        flat = [
            [
                tensor.detach().view(-1)
                for tensor in (param, param.grad, torch.zeros_like(ema), torch.zeros_like(ema), ema)
            ]
            for param, ema in zip(params, emas, strict=True)
        ]
        count = 0

        @torch.no_grad()
        def step() -> Outputs:
            nonlocal count
            count += 1
            norm = torch.nn.utils.get_total_norm([param.grad for param in params], foreach=True)
            scale = (_MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
            rate = 1.0 - optim.ema_decay_at(count, _EMA_DECAY)
            scalars = [_LR / (1 - _BETAS[0] ** count), (1 - _BETAS[1] ** count) ** 0.5, rate]
            for tensors in flat:
                update(*tensors, scale, *(torch.tensor(value) for value in scalars))
            return (*params, *emas)

        return step

    others = {"AdamW(fused) + clip + lerp": fused()}
    if place.device == "cuda" and backend.why_no_apex("optimizers") is None:
        others["apex FusedAdam + clip + lerp"] = problem.ours(optim.ApexAdamEMA)
    yield problem.task(
        "adamw_ema",
        case,
        adamw_cost.global_norm(problem.count, FLOAT) + adamw_cost.step_(problem.count, FLOAT),
        lambda: problem.ours(optim.AdamWEMA),
        others,
        {"one kernel per tensor": one_kernel},
    )


def lamb_ema(case: Any, place: Place = HERE) -> Iterator[Task]:
    """LambEMA beside LAMB out of PyTorch's operators on lists. PyTorch has no LAMB; nothing is worth compiling, for the
    norms part the list into kernels per tensor."""
    problem = _Problem(case, place)

    def foreach() -> Function:
        params = problem.parameters()
        grads = [param.grad for param in params]
        m, v = ([torch.zeros_like(value) for value in problem.start] for _ in range(2))
        emas = [value.clone() for value in problem.start]
        adapted = torch.tensor([param.dim() >= case.min_ndim for param in params], device=place.device)
        count = 0

        @torch.no_grad()
        def step() -> Outputs:
            nonlocal count
            count += 1
            torch.nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=True)
            torch._foreach_lerp_(m, grads, 1 - _BETAS[0])
            torch._foreach_mul_(v, _BETAS[1])
            torch._foreach_addcmul_(v, grads, grads, 1 - _BETAS[1])
            roots = torch._foreach_sqrt(v)
            torch._foreach_mul_(roots, (1 - _BETAS[0] ** count) / (1 - _BETAS[1] ** count) ** 0.5)
            torch._foreach_add_(roots, _EPS * (1 - _BETAS[0] ** count))
            updates = torch._foreach_div(m, roots)
            torch._foreach_add_(updates, params, alpha=_DECAY)
            of_params, of_updates = (torch.stack(torch._foreach_norm(values)) for values in (params, updates))
            adapts = adapted & (of_params != 0) & (of_updates != 0)
            rates = -_LR * torch.where(adapts, of_params / of_updates, 1.0)
            torch._foreach_mul_(updates, list(rates.unbind()))
            torch._foreach_add_(params, updates)
            torch._foreach_lerp_(emas, params, 1.0 - optim.ema_decay_at(count, _EMA_DECAY))
            return (*params, *emas)

        return step

    yield problem.task(
        "lamb_ema",
        case,
        adamw_cost.global_norm(problem.count, FLOAT) + lamb_cost.step_(problem.count, FLOAT),
        lambda: problem.ours(optim.LambEMA, min_ndim=case.min_ndim),
        {"foreach LAMB + clip + lerp": foreach()},
        {},
    )
