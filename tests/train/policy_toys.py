"""Small runs of DxMI."""

from collections.abc import Callable
from dataclasses import replace

from maskdm_fast.train.config import PolicyDistillationConfig, RunConfig

SMALL = {"num_steps": 4, "value_width": 8, "value_lr": 1e-2}
VIT = {"value": "vit", "value_depth": 1, "value_heads": 2}
CASES = {
    "as published": {},
    "as published at 64 px": {
        "num_policy_updates": 4, "skip_last": 1, "value_max_grad_norm": 0.1, "warmup_images": 8, "micro_batch_size": 3,
    },
    "a value that knows the time": {
        **VIT, "value_time": True, "resample": True, "entropy_in_value": 0, "velocity_in_value": 1, "hflip": 0.5,
        "time_cost": "none", "num_classes": 3, "micro_batch_size": 2, "activation_checkpointing": True,
    },
    "ve": {
        "policy": "ve", "noise_range": (0.05, 3.0), "rho": 4.0, "stochastic_last": True, "fixed_sigmas": 0,
        "tau_convention": "total", "time_cost": "linear", "gamma": 2.0, "sigma_lr": 3e-3, "weight_decay": 0.1,
    },
    "own levels": {"num_steps": 2, "alpha_bars": (0.02, 0.5), "tau_velocity": 0.1, "avr_decay": 0.5},
}  # fmt: skip


def make_policy_run(make_student: Callable[..., RunConfig], num_classes: int = 0, **changes) -> RunConfig:
    """A run of the fixture `make_student`."""
    config = make_student(PolicyDistillationConfig, **{**SMALL, **changes})
    conditional = num_classes > 0
    return replace(config, model=replace(config.model, num_classes=num_classes), class_conditional=conditional)
