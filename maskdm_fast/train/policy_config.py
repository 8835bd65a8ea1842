"""Configuration of DxMI on images: a policy of few steps and a value that train each other."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from maskdm_fast.diffusion import NoiseSchedule
from maskdm_fast.distill import DxMIConfig, ddpm_policy, ve_policy
from maskdm_fast.distill.dxmi_image_values import ResNetValue, ViTValue, ViTValueConfig
from maskdm_fast.distill.dxmi_policy import LogSigmas, PolicySchedule, fastdpm_alpha_bars
from maskdm_fast.models import UViTConfig
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.stage_config import check

MAX_RATIO = 100.0
"""Of two signal shares one after the other; the step between them multiplies x by up to the root of it."""
MAX_START = 0.5
"""Signal share of the first state, which in truth is noise alone."""
_OF_SCHEDULE = {"ddpm": ("alpha_bars",), "ve": ("noise_range", "rho", "stochastic_last")}
"""Options that only one kind of policy has."""
_TIME_COST = {"sigmoid": 1.0, "linear": 0.05, "none": 1.0}


@dataclass(frozen=True)
class PolicyDistillationConfig(DistillationConfig):
    """One stage of DxMI: a policy of T steps, at first the ancestral sampler of its teacher, and a value of images,
    which at the end of the policy's steps is the energy that tells data from samples."""

    kind: ClassVar[str] = "policy-distillation"
    makes_denoiser: ClassVar[bool] = False

    num_steps: int = 10
    """T, evaluations of the policy for one image."""
    policy: Literal["ddpm", "ve"] = "ddpm"
    """Ancestral steps at first: ddpm, between states of variance 1 (published for CIFAR-10); ve, between images with
    noise added (for teachers of schedule edm)."""
    alpha_bars: tuple[float, ...] | None = None
    """ddpm: rising shares of signal variance that the T steps start from, from 0.005 to 0.03 on; for 4 steps try 0.02
    0.3 0.75 0.97. None: those of FastDPM, which begin at 0.02 for 10 steps, but for 4 at 0.34, too far from the noise
    that goes in."""
    noise_range: tuple[float, float] | None = None
    """ve: least and greatest noise level. None: 0.002 and 80, as published."""
    rho: float | None = None
    """ve: how the levels between them are spread, even in level**(1/rho). None: 7, as published for 10 steps; for 4
    steps 4 is."""
    stochastic_last: bool = False
    """ve: end at the least noise level instead of at 0, so that the last step adds noise as well (published for 4
    steps)."""
    fixed_sigmas: int = 1
    """The noise of the last so many steps is not trained."""
    tau_entropy: float = 0.1
    """Weight of the entropy in the policy's loss; below 0.5 / gamma to be useful."""
    tau_velocity: float = 0.01
    """Weight of its squared moves."""
    tau_convention: Literal["per-dimension", "total"] = "per-dimension"
    """Costs are means over the values of an image (as in the published code) or sums (as in the paper)."""
    skip_last: int = 0
    """The last so many steps have no such costs (published: 3 for 10 steps at 64 px)."""
    entropy_in_value: int | None = None
    """The value's targets hold the entropy of all but the last so many steps. None: of none, as published."""
    velocity_in_value: int | None = None
    """The same for the squared moves."""
    time_cost: Literal["sigmoid", "linear", "none"] = "sigmoid"
    """What a step costs in the value's targets instead: sigmoid, most in the middle; linear, always the same."""
    time_cost_scale: float | None = None
    """Multiplies the time cost. None: as published, 1 for sigmoid and 0.05 for linear."""
    gamma: float = 1.0
    """Weight of the squared energies, which keeps them within 1 / (2 gamma)."""
    avr_decay: float = 0.99
    """Of the running mean of the squared moves to which moves are compared."""
    resample: bool = False
    """The value's targets draw each next state anew instead of taking it from the rollout."""
    num_policy_updates: int = 1
    """Updates of the policy in an iteration, 1 to T (published: 1 at 32 px, T at 64 px and more)."""
    sigma_lr: float | None = None
    """Learning rate of the logarithms of the policy's noise, which have no weight decay. None: 100 * lr."""
    value: Literal["resnet", "vit"] = "resnet"
    """The value's network: the published one without norms, or a transformer, which wants a warm-up and
    --value-max-grad-norm 0.1."""
    value_width: int | None = None
    """resnet: channels of its first blocks; vit: width of its tokens. None: 128 (published), 256."""
    value_depth: int | None = None
    """vit: blocks. None: 6."""
    value_heads: int | None = None
    """vit: attention heads. None: 4."""
    value_time: bool = False
    """vit: tell it the number of the step. Without, one energy of images ranks them at all steps, as published."""
    value_lr: float = 1e-5
    """Learning rate of the value."""
    value_max_grad_norm: float | None = None
    """Scale the value's gradient down to this norm, as the value and as the energy; None: never. Published at 64 px and
    more: 0.1, but not in the update as the energy."""
    value_precision: Literal["fp32", "run"] = "fp32"
    """Of the value's network: float32, for its differences are small, or the precision of the run. Its losses are
    float32 always."""
    lr: float = 1e-7
    max_grad_norm: float | None = 0.1

    @property
    def sampling_steps(self) -> int:
        """Those of the policy."""
        return self.num_steps

    @property
    def images_per_update(self) -> float:
        """See `StageConfig`: all of the policy's updates in an iteration share a batch."""
        return self.batch_size / self.num_policy_updates

    def method(self) -> DxMIConfig:
        """What an iteration computes.

        Raises:
            ValueError: an option is out of its range.
        """
        scale = _TIME_COST[self.time_cost] if self.time_cost_scale is None else self.time_cost_scale
        names = (
            "num_steps", "tau_entropy", "tau_velocity", "tau_convention", "skip_last", "entropy_in_value",
            "velocity_in_value", "time_cost", "gamma", "avr_decay", "resample", "num_policy_updates",
        )  # fmt: skip
        return DxMIConfig(time_cost_scale=scale, **{name: getattr(self, name) for name in names})

    def steps(self, schedule: NoiseSchedule) -> PolicySchedule:
        """The policy's steps from a teacher of this schedule.

        Raises:
            ValueError: an option is out of its range, or a step would multiply x by too much.
        """
        if self.policy == "ve":
            options: dict[str, Any] = {
                name: getattr(self, name) for name in ("noise_range", "rho") if getattr(self, name) is not None
            }
            return ve_policy(schedule, self.num_steps, stochastic_last=self.stochastic_last, **options)
        if self.alpha_bars is not None:
            return ddpm_policy(schedule, alpha_bars=self.alpha_bars)
        return ddpm_policy(schedule, self.num_steps)

    def log_sigmas(self, steps: PolicySchedule) -> LogSigmas:
        """The logarithms of the policy's noise before training."""
        return LogSigmas([step.std for step in steps.steps], num_fixed=self.fixed_sigmas)

    def make_value(self, model: UViTConfig, *, seed: int) -> nn.Module:
        """The value's network before training."""
        if self.value == "vit":
            return ViTValue(self._vit(model), seed=seed)
        width = {} if self.value_width is None else {"width": self.value_width}
        return ResNetValue(model.image_size, model.patch_size, channels=model.channels, seed=seed, **width)

    def _vit(self, model: UViTConfig) -> ViTValueConfig:
        given = {"dim": self.value_width, "depth": self.value_depth, "num_heads": self.value_heads}
        return ViTValueConfig(
            image_size=model.image_size,
            patch_size=model.patch_size,
            channels=model.channels,
            num_times=self.num_steps + 1 if self.value_time else 0,
            **{name: value for name, value in given.items() if value is not None},
        )

    def sigma_lr_at(self, step: int) -> float:
        """As `lr_at`, of the policy's noise."""
        return self.warm(100.0 * self.lr if self.sigma_lr is None else self.sigma_lr, step)

    def value_lr_at(self, step: int) -> float:
        """As `lr_at`, of the value."""
        return self.warm(self.value_lr, step)

    def validate(self, model: UViTConfig, *, has_classes: bool) -> None:
        """As `StageConfig`."""
        super().validate(model, has_classes=has_classes)
        self.method()
        for kind, names in _OF_SCHEDULE.items():
            for name in names:
                value = getattr(self, name)
                check(f"policy is {self.policy}, and {name}", value, kind == self.policy or not value, f"{kind}'s only")
        if self.alpha_bars is not None:
            count = len(self.alpha_bars)
            check("alpha_bars", self.alpha_bars, count == self.num_steps, f"as many as num_steps, {self.num_steps}")
            rises = all(0.0 < a < b < MAX_RATIO * a for a, b in itertools.pairwise((*self.alpha_bars, 1.0)))
            check("alpha_bars", self.alpha_bars, rises, f"rising in (0, 1), each by less than {MAX_RATIO:g} times")
        if self.policy == "ddpm":
            first = (self.alpha_bars or fastdpm_alpha_bars(self.num_steps, 0.0))[0]
            want = f"{MAX_START:g} at most: give --alpha-bars, beginning at 0.005 to 0.03"
            check("the signal share before the first step", round(first, 3), first <= MAX_START, want)
        want = f"0 to {self.num_steps - 1}, so that some noise is trained"
        check("fixed_sigmas", self.fixed_sigmas, 0 <= self.fixed_sigmas < self.num_steps, want)
        for name in ("sigma_lr", "value_lr", "value_max_grad_norm", "value_width", "value_depth", "value_heads"):
            value = getattr(self, name)
            check(name, value, value is None or value > 0, "more than 0, or None")
        if self.value == "vit":
            self._vit(model)
            return
        for name in ("value_depth", "value_heads", "value_time"):
            check(f"value is resnet, and {name}", getattr(self, name), not getattr(self, name), "vit's only")
        check("value is resnet, and image_size", model.image_size, model.image_size % 8 == 0, "a multiple of 8")
