"""What one iteration of `dxmi` computes, and in which order."""

import dataclasses
import math
from typing import Literal

TIME_COSTS = ("sigmoid", "linear", "none")
TAU_CONVENTIONS = ("per-dimension", "total")


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer step: of which network, and the time (of a value) or the number (of a policy update).

    Without an energy of its own, "energy" steps the value.
    """

    network: Literal["energy", "value", "policy"]
    index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DxMIConfig:
    """What one iteration of DxMI computes. The defaults are those of the paper for images.

    Args:
        num_steps: T, steps of the policy.
        tau_entropy: weight of the entropy, 0 or more.
        tau_velocity: weight of the squared moves, 0 or more.
        tau_convention: "per-dimension", what the published code computes, or "total", what the paper writes: the same
            with D times the tau.
        skip_last: how many of the last steps of the policy have no running cost in its own loss.
        entropy_in_value: the value targets hold the entropy of all but the last so many steps; None: of no step.
        velocity_in_value: likewise for the moves.
        time_cost: what each step costs in the value targets. sigmoid: ``S(T//2 - t) - S(T//2 - t - 1)`` with the
            logistic function S; linear: 1; none: 0.
        time_cost_scale: multiplies the time cost. The paper's linear cost is 0.05 per step.
        gamma: weight of the squared energies, which bounds them: ``|E| <= 1 / (2 gamma)`` at the optimum.
        avr_decay: of the running mean of the squared moves, `adapt_velocity`.
        resample: value targets draw x_{t+1} anew from the policy instead of taking that of the rollout.
        num_policy_updates: policy steps in an iteration, 1 to T; each takes one transition of every trajectory, and no
            transition is taken twice.

    Raises:
        ValueError: if a value is out of range.
    """

    num_steps: int
    tau_entropy: float = 0.1
    tau_velocity: float = 0.01
    tau_convention: str = "per-dimension"
    skip_last: int = 0
    entropy_in_value: int | None = None
    velocity_in_value: int | None = None
    time_cost: str = "sigmoid"
    time_cost_scale: float = 1.0
    gamma: float = 1.0
    avr_decay: float = 0.99
    resample: bool = False
    num_policy_updates: int = 1

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, want at least 1")
        for name in ("tau_entropy", "tau_velocity", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, want 0 or more")
        for name, known in (("tau_convention", TAU_CONVENTIONS), ("time_cost", TIME_COSTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, want one of {', '.join(known)}")
        for name in ("skip_last", "entropy_in_value", "velocity_in_value"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= self.num_steps:
                raise ValueError(f"{name} is {value}, want 0 to num_steps {self.num_steps}")
        if not 0 <= self.avr_decay < 1:
            raise ValueError(f"avr_decay is {self.avr_decay}, want 0 <= avr_decay < 1")
        if not 1 <= self.num_policy_updates <= self.num_steps:
            raise ValueError(f"num_policy_updates is {self.num_policy_updates}, want 1 to num_steps {self.num_steps}")

    def updates(self) -> tuple[Update, ...]:
        """The optimizer steps of one iteration, in order: energy, values backward in time, policy."""
        values = tuple(Update("value", t) for t in reversed(range(self.num_steps)))
        return (Update("energy"), *values, *(Update("policy", k) for k in range(self.num_policy_updates)))

    def time_costs(self) -> list[float]:
        """R(t) for t = 0..T-1."""
        if self.time_cost == "none":
            return [0.0] * self.num_steps
        if self.time_cost == "linear":
            return [self.time_cost_scale] * self.num_steps
        ramp = [1.0 / (1.0 + math.exp(t - self.num_steps // 2)) for t in range(self.num_steps + 1)]
        return [self.time_cost_scale * (ramp[t] - ramp[t + 1]) for t in range(self.num_steps)]
