"""Configuration of distillation by regression: guided, progressive and consistency distillation."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from maskdm_fast.diffusion import Guidance
from maskdm_fast.distill import (
    ConsistencyDistillation,
    GuidedDistillation,
    ProgressiveDistillation,
    StepMapping,
    halvings,
)
from maskdm_fast.models import UViTConfig
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.stage_config import StageConfig, check

_BELONGS = {
    "num_steps": ("progressive",),
    "predicts": ("guided",),
    "label_drop": ("guided",),
    **dict.fromkeys(("level_draw", "level_mean", "level_std"), ("guided", "consistency")),
    **dict.fromkeys(
        ("path", "solver", "huber", "images_per_stage", "num_stages", "gap_factor", "sampling_levels"),
        ("consistency",),
    ),
}
"""Options that not every method has, and which have them."""
_OF_A_TEACHER = ("solver", "guidance", "strengths", "clip")
"""Options without a meaning where no teacher is asked."""


@dataclass(frozen=True)
class RegressionConfig(DistillationConfig):
    """One stage of distillation by regression: a student learns targets that its teacher makes of noisy images."""

    kind: ClassVar[str] = "regression-distillation"

    method: Literal["guided", "progressive", "consistency"] = "consistency"
    """guided: one evaluation does what a guided teacher needs two for, in as many steps as before; progressive: one
    step leads where two of the teacher do; consistency: from every noise level straight to the image."""
    num_steps: int | None = None
    """progressive: steps of the student, half those of its teacher. It wants to be set."""
    predicts: Literal["eps", "x0", "v", "flow", "edm"] | None = None
    """guided: what the student predicts. None: the same as its teacher. Of a teacher of eps, progressive distillation
    wants a student of v first."""
    guidance: float = 1.0
    """Scale of the teacher's guidance, 1 being none, for a student that is not told one."""
    strengths: tuple[float, float] | None = None
    """Least and greatest weight w of guidance that the student is told, drawn for each image; scale 1 + w, so 0 follows
    the class as trained (0 4 is published). None: it is told none."""
    label_drop: float = 0.0
    """guided, without strengths: probability of training an image without its class, so that the student can be guided
    as its teacher was."""
    weight: Literal["truncated-snr", "snr-plus-one", "edm", "none", "gap"] | None = None
    """Of the squared error of x0 by noise level: truncated-snr, the greater of the errors of x0 and of eps;
    snr-plus-one, that of v; edm; or consistency's gap, 1 over the distance of the two levels. None: gap for
    consistency, truncated-snr for the others, as published."""
    clip: float | None = None
    """Clip the teacher's estimates to this absolute value, 1 for images. None: do not, unless a student of another
    prediction learns from a teacher of eps, whose estimates have no bound where alpha is nearly 0: then as samplers do,
    images to 1 and latents to --latent-bound."""
    level_draw: Literal["uniform", "lognormal"] | None = None
    """guided, consistency: how noise levels are drawn, as times in training or normally in ln(sigma/alpha). None:
    uniform for guided, lognormal for consistency."""
    level_mean: float | None = None
    """level_draw lognormal: mean of ln(sigma/alpha). None: -1.2, for consistency -1.1."""
    level_std: float | None = None
    """level_draw lognormal: standard deviation of ln(sigma/alpha). None: 1.2, for consistency 2."""
    even_levels: bool = False
    """Spread the levels of each batch evenly, which makes its loss less noisy."""
    path: Literal["teacher", "data"] = "teacher"
    """consistency: what leads from a noise level to the next lower one: the teacher's estimate (distillation), or the
    image itself (training, for which the teacher is no more than the beginning)."""
    solver: Literal["euler", "heun"] = "euler"
    """consistency, path teacher: euler asks it once, heun twice."""
    huber: float = 0.00054
    """consistency: below errors of this size the loss is quadratic, above it linear; per value of an image."""
    images_per_stage: int = 3_200_000
    """consistency: images after which the two levels move closer together."""
    num_stages: int = 8
    """consistency: how often they do, less one; the last stage goes on to the end."""
    gap_factor: float = 2.0
    """consistency: by what a stage divides their distance; the first begins at 1 / gap_factor of the level."""
    sampling_levels: tuple[float, ...] = ()
    """consistency: falling noise levels sigma/alpha of further evaluations, after the first from noise alone. A sample
    takes one step more than there are levels."""
    lr: float = 1e-4
    max_grad_norm: float | None = 1.0
    ema_half_life_images: int = 125_000

    @property
    def makes_denoiser(self) -> bool:
        """See `StageConfig`: whether the student can take any network's place."""
        return self.method == "guided" and self.strengths is None

    @property
    def sampling_steps(self) -> int:
        """See `StageConfig`."""
        if self.method == "progressive":
            return self.num_steps
        return 1 + len(self.sampling_levels) if self.method == "consistency" else super().sampling_steps

    @property
    def can_be_guided(self) -> bool:
        """See `StageConfig`."""
        return self.label_drop > 0.0

    @property
    def guides_teacher(self) -> bool:
        """See `DistillationConfig`; a teacher that is told its guidance is not."""
        return self.strengths is not None or self.guidance != 1.0

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked in training, rather than only copied at the start."""
        return self.method != "consistency" or self.path == "teacher"

    def student_prediction(self, of_teacher: str) -> str:
        """See `DistillationConfig`."""
        return of_teacher if self.predicts is None else self.predicts

    def clip_at(self, of_teacher: str, bound: float) -> float | None:
        """Where the estimates of a teacher with this kind of prediction are clipped.

        An error of eps is one of x0 times ``sigma / alpha``. A student of eps divides by it, another one would see
        targets of thousands.

        Args:
            of_teacher: what it predicts.
            bound: of the data.
        """
        if self.clip is None and of_teacher == "eps" and self.student_prediction(of_teacher) != "eps":
            return bound
        return self.clip

    def strength_of(self, scale: float) -> float:
        """The weight w that a student is told for a guidance of this scale.

        Raises:
            ValueError: it was trained with others.
        """
        least, greatest = self.strengths
        if not least <= scale - 1.0 <= greatest:
            raise ValueError(
                f"guidance is {scale:g}, but the student was trained with {1.0 + least:g} to {1.0 + greatest:g}"
            )
        return scale - 1.0

    def evaluations(self, *, told_teacher: bool = False) -> float:
        """How many forward passes an update costs for one image, a backward pass counting two.

            3, the student's; guided 1, progressive 2, consistency 1 or with heun 2 of the teacher, twice as many if
            that is guided; consistency 1 more, of the student

        Args:
            told_teacher: the teacher is told the weights, rather than guided by them.
        """
        is_guided = self.guides_teacher and not told_teacher
        calls = 2.0 if self.method == "progressive" or self.solver == "heun" else 1.0
        of_teacher = calls * (2.0 if is_guided else 1.0) if self.asks_teacher else 0.0
        return 3.0 + of_teacher + (1.0 if self.method == "consistency" else 0.0)

    def make(
        self, model: UViTConfig, *, told_teacher: bool = False
    ) -> GuidedDistillation | ProgressiveDistillation | ConsistencyDistillation:
        """The method.

        Args:
            model: the network.
            told_teacher: see `maskdm_fast.distill.Regression`.

        Raises:
            ValueError: an option is out of its range.
        """
        shared: dict[str, Any] = {
            "patch_size": model.patch_size,
            "hflip": self.hflip,
            "clip": self.clip,
            "guidance": Guidance(self.guidance),
            "strengths": self.strengths,
            "told_teacher": told_teacher,
            **({} if self.weight is None else {"weight": self.weight}),
        }
        num_strata = self.batch_size if self.even_levels else None
        if self.method == "progressive":
            return ProgressiveDistillation(**shared, num_steps=self.num_steps, num_strata=num_strata)
        if self.method == "guided":
            method = GuidedDistillation(**shared)
        else:
            mapping = StepMapping(-(-self.images_per_stage // self.batch_size), self.num_stages, self.gap_factor)
            method = ConsistencyDistillation(**shared, mapping=mapping, solver=self.solver, huber=self.huber)
        given = {"kind": self.level_draw, "mean": self.level_mean, "std": self.level_std}
        given = {name: value for name, value in given.items() if value is not None}
        draw = dataclasses.replace(method.timesteps, **given, num_strata=num_strata)
        if draw.kind != "lognormal" and given.keys() & {"mean", "std"}:
            raise ValueError(f"level_draw is {draw.kind}, which has no level_mean or level_std; leave them out")
        return dataclasses.replace(method, timesteps=draw)

    def check_teacher(self, teacher: StageConfig) -> None:
        """See `DistillationConfig`."""
        if not isinstance(teacher, RegressionConfig) or teacher.method == "consistency":
            super().check_teacher(teacher)
            return
        if teacher.method == "progressive" and (self.method, self.num_steps) != ("progressive", teacher.num_steps / 2):
            raise ValueError(
                f"it makes images in {teacher.num_steps} steps, and knows no other noise levels: want method "
                f"progressive with num_steps {teacher.num_steps / 2:g}"
            )
        if teacher.strengths is not None:
            least, greatest = teacher.strengths
            if self.strengths is None or not least <= self.strengths[0] <= self.strengths[1] <= greatest:
                raise ValueError(
                    f"it is told how strongly it is guided: want strengths within {least:g} {greatest:g}, not "
                    f"{self.strengths}"
                )
        elif self.guides_teacher:
            teacher.check_guidable("it")

    def validate(self, model: UViTConfig, *, has_classes: bool) -> None:
        """As `StageConfig`."""
        super().validate(model, has_classes=has_classes)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, methods in _BELONGS.items():
            if self.method not in methods and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"method {self.method} has no {name}, which is for {' and '.join(methods)}; leave it out"
                )
        if not self.asks_teacher:
            for name in _OF_A_TEACHER:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"path is data, so no teacher is asked, but {name} is for one; leave it out")
        if self.method == "progressive":
            steps = self.num_steps
            check("num_steps", steps, steps is not None and steps >= 1, "the steps of the student, 1 or more")
        elif self.method == "guided":
            if self.strengths is None and self.guidance == 1.0 and self.predicts is None:
                raise ValueError("method guided has nothing to learn: set strengths, guidance or predicts")
            check("label_drop", self.label_drop, 0 <= self.label_drop < 1, "a number from 0 to 1, and less than 1")
            if self.label_drop and self.strengths is not None:
                raise ValueError("label_drop is for a student without strengths; leave out one of them")
        check("images_per_stage", self.images_per_stage, self.images_per_stage >= 1, "1 or more")
        check("gap_factor", self.gap_factor, self.gap_factor > 1, "more than 1")
        levels = self.sampling_levels
        falling = all(low < high for high, low in itertools.pairwise(levels)) and all(level > 0 for level in levels)
        check("sampling_levels", levels, falling, "falling noise levels, more than 0")
        self.make(model)
        if not has_classes:
            for name in ("strengths", "guidance", "label_drop"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but the model has no classes; add --class-conditional"
                    )


def is_told(stage: StageConfig) -> bool:
    """Whether the network of a stage is told the weight of its guidance."""
    return isinstance(stage, RegressionConfig) and stage.strengths is not None


def progressive_stages(first: int, last: int, **options: Any) -> tuple[tuple[str, RegressionConfig], ...]:
    """The rounds of progressive distillation for a `maskdm_fast.train.config.Recipe`.

    Args:
        first: steps of the teacher of the first round, DDIM's.
        last: steps of the last student, ``first / 2^rounds``.
        options: of every round, as in `RegressionConfig`. After the first a student begins as the one before it, and
            `guidance` is in it already.

    Returns:
        Names such as ``steps8``, of which options on the command line are made, and configurations.

    Raises:
        ValueError: halving `first` does not lead to `last`.
    """
    rounds = [RegressionConfig(method="progressive", num_steps=steps, **options) for steps in halvings(first, last)]
    later = (dataclasses.replace(stage, guidance=1.0, init_from=None) for stage in rounds[1:])
    return tuple((f"steps{stage.num_steps}", stage) for stage in (rounds[0], *later))
