"""What optimizers share whose state holds the EMA of the weights.

Whatever shards, offloads or saves the state takes the EMA along.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema.op import global_norm
from maskdm_fast.ops.checks import accumulate_dtype


def ema_decay_at(step: int | Tensor, ema_decay: float) -> float | Tensor:
    """EMA decay of step k, counted from 1: ``min(ema_decay, 1 - (1 + k) ** (-2/3))``; a float64 tensor for a tensor.

    The warm-up forgets the initial weights: early averages span a share of the run so far instead of
    ``1 / (1 - ema_decay)`` steps. Source: the inverse-power rule of ema_pytorch, which the official MaskDM code uses.
    """
    if isinstance(step, Tensor):
        return (1.0 - (1.0 + step.double()) ** (-2.0 / 3.0)).clamp(max=ema_decay)
    return min(ema_decay, 1.0 - (1.0 + step) ** (-2.0 / 3.0))


@torch.no_grad()
def cut_by_value_(grads: Sequence[Tensor], limit: float) -> None:
    """In place: NaN becomes 0, and every other value is cut to ``[-limit, limit]``.

    Source: the code of Zhou et al., SiD (ICML 2024), which takes 1e5, and SiDA (ICLR 2025), 1.
    """
    grads = list(grads)
    if not grads:
        return
    for grad in grads:
        grad.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
    torch._foreach_clamp_min_(grads, -limit)
    torch._foreach_clamp_max_(grads, limit)


class EMAOptimizer(torch.optim.Optimizer):
    """Clipping, a loss scale, the state of Adam's family with the EMA in it, and its numbers on the device or not.

    A subclass says in `_fused_step` which op takes the step.

    Args:
        params: contiguous parameters, or groups of them.
        defaults: of the groups: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``ema_decay``, and what else an op
            takes.
        max_grad_norm, max_grad_value, capturable, compute_grad_norm: as for `AdamWEMA`.

    Raises:
        ValueError: a value outside its range; clipping without the norm.
    """

    SLOTS = ("exp_avg", "exp_avg_sq", "ema")
    """Tensors that the state of a parameter may have, beside its step."""
    _keeps_first_moment = False
    """Whether there is one for beta1 = 0 as well, where it is the gradient."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        max_grad_norm: float | None,
        max_grad_value: float | None,
        capturable: bool,
        compute_grad_norm: bool,
    ) -> None:
        lr, eps, weight_decay = (defaults[name] for name in ("lr", "eps", "weight_decay"))
        if (not isinstance(lr, Tensor) and lr < 0) or eps < 0 or weight_decay < 0:
            raise ValueError(f"{self._name}: lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in defaults["betas"]):
            raise ValueError(f"{self._name}: betas are {defaults['betas']}, want each in [0, 1)")
        if defaults["ema_decay"] is not None and not 0 <= defaults["ema_decay"] <= 1:
            raise ValueError(f"{self._name}: ema_decay is {defaults['ema_decay']}, want it in [0, 1] or None")
        for name, value in (("max_grad_norm", max_grad_norm), ("max_grad_value", max_grad_value)):
            if value is not None and not value > 0:
                raise ValueError(f"{self._name}: {name} is {value}, want a positive number or None")
        if max_grad_norm is not None and not compute_grad_norm:
            raise ValueError(f"{self._name}: max_grad_norm is {max_grad_norm}, which takes compute_grad_norm=True")
        self.capturable = capturable
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.max_grad_value = max_grad_value
        self.compute_grad_norm = compute_grad_norm
        self.grad_norm: Tensor | None = None
        self.found_inf: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; torch's own keeps none of what it did not set."""
        own = ("capturable", "max_grad_norm", "max_grad_value", "compute_grad_norm", "grad_norm", "found_inf")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _slots_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Which of `SLOTS` the parameters of a group have."""
        unwanted = {
            "exp_avg": group["betas"][0] == 0 and not self._keeps_first_moment,
            "ema": group["ema_decay"] is None,
        }
        return tuple(slot for slot in self.SLOTS if not unwanted.get(slot))

    def _fused_step(self, group: dict[str, Any], *lists: tuple[Tensor, ...] | None, **numbers: Any) -> None:
        """Update params by grads, exp_avgs, exp_avg_sqs and emas, all of one step.

        Args:
            group: the parameter group with the settings of the op.
            lists: params, grads, exp_avgs, exp_avg_sqs, emas; None where the group has no such slot.
            numbers: step, ema_decay, grad_scale and found_inf, as the op takes them.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for every torch optimizer."""
        super().add_param_group(param_group)
        self._place_lr(self.param_groups[-1])

    def _place_lr(self, group: dict[str, Any]) -> None:
        if self.capturable:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)

    def _place_steps(self, steps: dict[Tensor, int]) -> None:
        """Set ``state["step"]`` of parameters; on the device, one tensor stands for all that are of one age."""
        shared: dict[tuple[torch.device, int], Tensor] = {}
        for param, step in steps.items():
            if self.capturable and (param.device, step) not in shared:
                shared[param.device, step] = torch.full((), step, dtype=torch.int64, device=param.device)
            self.state[param]["step"] = shared[param.device, step] if self.capturable else step

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        states = [self.state[param] for param in params]
        if not all(states):
            new = [param for param, state in zip(params, states, strict=True) if not state]
            if backend.is_capturing(new[0]):
                raise RuntimeError(
                    f"{self._name}: each replay would make the state anew; run a step before the capture"
                )
            slots = {param: self._slots_of(group) for group in self.param_groups for param in group["params"]}
            for param in new:
                dtype = accumulate_dtype(param.dtype)
                for slot in slots[param]:
                    self.state[param][slot] = (
                        param.detach().to(dtype, copy=True) if slot == "ema" else torch.zeros_like(param, dtype=dtype)
                    )
            self._place_steps(dict.fromkeys(new, 0))
        return states

    def make_state(self) -> None:
        """Make the state of every parameter that has none, as its first step would."""
        self._states_of([param for group in self.param_groups for param in group["params"]])

    def _count_on_device(self, states: list[dict[str, Any]], increment: int | Tensor) -> None:
        """Add `increment` to the steps of `states`, each tensor once."""
        users = Counter(id(state["step"]) for state in self.state.values())
        by_step: dict[int, list[dict[str, Any]]] = {}
        for state in states:
            by_step.setdefault(id(state["step"]), []).append(state)
        for members in by_step.values():
            step = members[0]["step"]
            if len(members) < users[id(step)]:  # the others got no gradient and stay behind
                if backend.is_capturing(step):
                    raise RuntimeError(
                        f"{self._name}: other parameters have a gradient than in the step before; run such a step "
                        "before the capture"
                    )
                step = step.clone()
                for state in members:
                    state["step"] = step
            step.add_(increment)

    def _scale_of(self, grads: list[Tensor], loss_scale: Tensor | None) -> Tensor | None:
        """What gradients are to be multiplied by, float32; sets `grad_norm` and `found_inf`."""
        self.grad_norm = self.found_inf = None
        if self.compute_grad_norm:
            self.grad_norm = global_norm(grads)
        if loss_scale is not None:
            self.found_inf = (~self.grad_norm.isfinite()).to(torch.float32)
            self.grad_norm = self.grad_norm / loss_scale
        if self.max_grad_norm is None:
            return None if loss_scale is None else loss_scale.reciprocal()
        factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).to(torch.float32)
        return factor if loss_scale is None else factor / loss_scale

    def _check_dense(self, grads: list[Tensor]) -> None:
        if any(grad.layout is not torch.strided for grad in grads):
            raise RuntimeError(f"{self._name}: sparse gradients are not supported; want nn.Embedding(sparse=False)")

    def _check_loss_scale(self, loss_scale: Tensor) -> None:
        if self.max_grad_value is not None:
            raise ValueError(
                f"{self._name}: max_grad_value is {self.max_grad_value}, which would hide the overflows that a loss "
                "scale follows; want None with one"
            )
        if not self.capturable or not self.compute_grad_norm:
            raise ValueError(
                f"{self._name}: a loss scale takes capturable=True and compute_grad_norm=True: whether the step is "
                "skipped is found in the norm of the gradients, and it must not count then"
            )
        if not isinstance(loss_scale, Tensor) or loss_scale.dtype != torch.float32 or loss_scale.ndim != 0:
            raise TypeError(f"{self._name}: loss_scale is {loss_scale!r}, want a float32 scalar tensor")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, loss_scale: Tensor | None = None) -> float | None:
        """Update every parameter that has a gradient; parameters without one keep their value and EMA.

        Args:
            closure: computes the loss and its gradients anew; called first.
            loss_scale: float32 scalar tensor on the device, the factor that the gradients carry: they are divided by
                it. If one of them is not finite, the step changes nothing and does not count, which the device decides
                without a wait; `found_inf` says so, and `torch._amp_update_scale_` takes it as it is. Needs
                `capturable`.

        Returns:
            What `closure` returned.

        Raises:
            ValueError: `loss_scale` for an optimizer that cannot skip a step, or that cuts gradients by value.
            TypeError: `loss_scale` is no float32 scalar tensor; `lr` of a capturable group is a number.
            RuntimeError: a gradient is sparse.
        """
        if loss_scale is not None:
            self._check_loss_scale(loss_scale)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [
            [(param, param.grad) for param in group["params"] if param.grad is not None] for group in self.param_groups
        ]
        grads = [grad for pairs in groups for _, grad in pairs]
        self._check_dense(grads)
        states = self._states_of([param for pairs in groups for param, _ in pairs])
        if self.max_grad_value is not None:
            cut_by_value_(grads, self.max_grad_value)
        grad_scale = self._scale_of(grads, loss_scale)
        if self.capturable:
            self._count_on_device(states, 1 if self.found_inf is None else self.found_inf == 0)
        state_of_pair = iter(states)
        for group, pairs in zip(self.param_groups, groups, strict=True):
            if self.capturable and not isinstance(group["lr"], Tensor):
                raise TypeError(
                    f"{self._name}: lr of a group is a number, which a captured step would not see change; use "
                    f'group["lr"].fill_({group["lr"]})'
                )
            # One call for all parameters of one age: after an unfreeze, ages within a group differ.
            by_step: dict[int | Tensor, list[tuple[Tensor | None, ...]]] = {}
            for (param, grad), state in zip(pairs, state_of_pair, strict=False):
                if not self.capturable:
                    state["step"] += 1
                row = (param, grad, *(state.get(slot) for slot in self.SLOTS))
                by_step.setdefault(state["step"], []).append(row)
            decay = group["ema_decay"]
            for step, rows in by_step.items():
                self._fused_step(
                    group,
                    *(None if column[0] is None else column for column in zip(*rows, strict=True)),
                    step=step,
                    ema_decay=None if decay is None else ema_decay_at(step, decay),
                    grad_scale=grad_scale,
                    found_inf=self.found_inf,
                )
        return loss

    def ema_parameters(self) -> Iterator[Tensor]:
        """The EMA of every parameter, in the order of the parameters; before the first step, the weights themselves.

        Raises:
            RuntimeError: a group has none, for its ema_decay is None.
        """
        if any(group["ema_decay"] is None for group in self.param_groups):
            raise RuntimeError(f"{self._name}: ema_decay is None, so there is no average of the weights")
        self.make_state()
        return (self.state[param]["ema"] for group in self.param_groups for param in group["params"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, capturable or not; waits for the device where steps are tensors.

        As with every torch optimizer, the groups take the settings that were saved, and what they say decides the
        slots: those that are not wanted are dropped.

        Raises:
            ValueError: a slot that a group wants was not saved; or it is the state of another algorithm, as of
                `torch.optim.AdamW` with `amsgrad`.
        """
        for group in state_dict["param_groups"]:
            self._check_algorithm(group)
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = [param for group in self.param_groups for param in group["params"]]
        saved = {
            param: state_dict["state"][index]
            for index, param in zip(saved_ids, params, strict=True)
            if index in state_dict["state"]
        }
        for group in self.param_groups:
            for name, value in self.defaults.items():  # what the optimizer that saved it does not know
                group.setdefault(name, value)
            for param in group["params"]:
                if param in saved:
                    self._load_slots(param, group, saved[param])
        self._place_steps({param: int(slots["step"]) for param, slots in saved.items()})
        for group in self.param_groups:
            self._place_lr(group)
            if not self.capturable:
                group["lr"] = float(group["lr"])

    def _check_algorithm(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a group that torch's Adam or AdamW saved asks for what this step does not do."""
        unknown = [name for name in ("amsgrad", "maximize") if group.get(name)]
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
            unknown.append("a weight decay within the gradient")
        if unknown:
            raise ValueError(f"{self._name}: what was saved comes with {' and '.join(unknown)}, which it does not know")

    def _load_slots(self, param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        dtype = accumulate_dtype(param.dtype)
        wanted = self._slots_of(group)
        for slot in self.SLOTS:
            if slot not in wanted:
                self.state[param].pop(slot, None)
            elif slot in saved:
                # torch gives them the dtype of the parameter, which may be shorter, or the memory of what was saved.
                self.state[param][slot] = saved[slot].to(param.device, dtype, copy=True)
            elif slot == "exp_avg" and group["betas"][0] == 0:
                self.state[param][slot] = torch.zeros_like(param, dtype=dtype)  # the next step sets it
            else:
                setting = "betas" if slot == "exp_avg" else "ema_decay"
                raise ValueError(
                    f"{self._name}: what was saved has no {slot}, which {setting} {group[setting]} takes; it comes "
                    "from an optimizer with other settings"
                )
