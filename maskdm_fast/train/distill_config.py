"""Configurations of the stages that make a generator of few steps from a trained model."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from maskdm_fast.diffusion import LossWeight
from maskdm_fast.distill import METHODS, GuidanceScales, LevelDraw, Method, falling_levels
from maskdm_fast.models import UViTConfig
from maskdm_fast.train.stage_config import StageConfig, check


@dataclass(frozen=True)
class DistillationConfig(StageConfig):
    """What every distillation is configured with.

    The student has the network, schedule and kind of prediction of its teacher, whatever the run's ``model`` and
    ``diffusion`` say, and without `init_from` it begins as a copy."""

    teacher: str = "emoji32"
    """Run, checkpoint folder or exported file whose weights are distilled; the student has its network, schedule and
    prediction. A relative path is looked up beside the run folder first, then in the working directory. A copy of the
    weights stays in the run folder."""
    teacher_weights: Literal["ema", "raw"] = "ema"
    """Which weights of the teacher: the moving average, or the trained weights themselves."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    ema_half_life_images: int = 500_000

    def student_prediction(self, of_teacher: str) -> str:
        """What the student of a teacher with this kind of prediction predicts."""
        return of_teacher

    @property
    def guides_teacher(self) -> bool:
        """Whether the teacher is asked with and without classes."""
        return False

    def check_teacher(self, teacher: StageConfig) -> None:
        """Raise ValueError unless what the stage `teacher` has made can be distilled."""
        if not teacher.makes_denoiser:
            raise ValueError(
                f"it comes from {teacher.kind}: it makes images in its own steps and denoises at no other level; want "
                "a run that denoises"
            )
        if self.guides_teacher:
            teacher.check_guidable("it")


@dataclass(frozen=True)
class ScoreDistillationConfig(DistillationConfig):
    """One stage of score distillation: a generator, and a fake network that knows what the generator makes."""

    kind: ClassVar[str] = "score-distillation"
    makes_denoiser: ClassVar[bool] = False

    method: Literal["sid", "sida", "dmd2"] = "sid"
    """sid needs no images; sida adds a discriminator, which does; dmd2 has cheaper steps, and one as well."""
    num_steps: int = 1
    """Evaluations of the generator for one image."""
    trained_steps: Literal["all", "one"] = "all"
    """Of several steps: all are trained through, or one of them at a time, for the memory of one."""
    input_level: float | None = None
    """Noise level sigma/alpha of the generator's input. None: that of the published recipe (sid and sida 2.5, dmd2
    80)."""
    alpha: float | None = None
    """sid, sida: how much of the naive loss is subtracted; 0.5 to 1.2. None: 1.2 for sid, 1 for sida."""
    weighting: Literal["l1", "l1_xt", "karras", "none"] = "l1"
    """Of the generator's loss by image and noise level: l1 (published) divides by the teacher's mean error."""
    levels: tuple[float, float] | None = None
    """Least and greatest noise level of the generator's loss. None: as published."""
    level_draw: Literal["karras", "lognormal", "uniform"] = "karras"
    """How levels between them are drawn: even in level**(1/7), normally in ln(level), or as times in training."""
    fake_updates: int | None = None
    """Updates of the fake network for each of the generator's. None: 1, for dmd2 5."""
    fake_lr: float | None = None
    """Learning rate of the fake network. None: lr."""
    fake_betas: tuple[float, float] | None = None
    """Decay rates of the moments of the fake network. None: betas."""
    fake_levels: tuple[float, float] | None = None
    """Least and greatest noise level of the fake network's loss. None: as published."""
    fake_level_draw: Literal["karras", "lognormal", "uniform"] | None = None
    """How levels between them are drawn. None: as published, lognormal, for dmd2 karras. Few of the published draws are
    above level 3, where the colour of an image is decided: short runs need karras."""
    fake_weight: Literal["edm", "none", "min-snr", "p2"] = "edm"
    """Weight of the fake network's loss by noise level, as --diffusion.loss-weight."""
    guidance: Literal["none", "teacher", "lsg", "zero"] = "none"
    """Classifier-free guidance: of the teacher alone; lsg: of all networks alike; zero: the fake network sees no
    classes."""
    guidance_scale: float = 1.0
    """Its scale; 1 is none."""
    adversarial: float | None = None
    """sida, dmd2: factor of the generator's adversarial loss. None: as published."""
    fake_adversarial: float | None = None
    """sida, dmd2: factor of the discriminator's loss. None: as published."""
    freeze_images: int | None = None
    """sida: images after which the generator begins to learn. None: as published, 100,000."""
    adversarial_from: int | None = None
    """sida: images after which the generator has an adversarial loss. None: as published, 200,000."""
    max_grad_value: float | None = 1e5
    """Before each step, gradients that are no number become 0 and all are cut to this absolute value (sida: 1 is
    published): an image in which the network that is trained overflows costs the update of its batch. None: never, so
    that such an image costs the run; float16 has its loss scale instead."""
    batch_size: int = 256
    lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.999)

    @property
    def sampling_steps(self) -> int:
        """Those of the generator."""
        return self.num_steps

    @property
    def needs_images(self) -> bool:
        """Only a discriminator does."""
        return self.make().needs_images

    @property
    def guides_teacher(self) -> bool:
        """See `DistillationConfig`."""
        return self.guidance_scale != 1.0

    @property
    def num_fake_updates(self) -> int:
        """Updates of the fake network for each of the generator's."""
        return METHODS[self.method].fake_updates if self.fake_updates is None else self.fake_updates

    @property
    def images_per_update(self) -> float:
        """See `StageConfig`: each of the fake network's updates has a batch."""
        return self.num_fake_updates * self.batch_size

    def make(self) -> Method:
        """The method.

        Raises:
            ValueError: an option is not one of this method, or out of its range.
        """
        published = METHODS[self.method]()
        score = published.fake_score
        score = dataclasses.replace(
            score,
            levels=_drawn(score.levels, self.fake_levels, self.fake_level_draw),
            weight=LossWeight(self.fake_weight),
        )
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("alpha", "adversarial", "fake_adversarial", "freeze_images", "adversarial_from")
            if getattr(self, name) is not None
        }
        unknown = options.keys() - {field.name for field in dataclasses.fields(published)}
        if unknown:
            raise ValueError(f"method {self.method} has no {sorted(unknown)[0]}; leave it out")
        return dataclasses.replace(
            published,
            weighting=self.weighting,
            levels=_drawn(published.levels, self.levels, self.level_draw),
            fake_score=score,
            guidance=GuidanceScales.of_mode(self.guidance, self.guidance_scale),
            **options,
        )

    def input_levels(self) -> tuple[float, ...]:
        """Noise levels of the generator's inputs, falling."""
        first = METHODS[self.method].input_level if self.input_level is None else self.input_level
        return falling_levels(first, self.num_steps)

    def validate(self, model: UViTConfig, *, has_classes: bool) -> None:
        """As `StageConfig`."""
        super().validate(model, has_classes=has_classes)
        if self.optimizer == "lamb":
            raise ValueError("optimizer is lamb, which always keeps an average; the fake network has none: want adamw")
        self.make()
        self.input_levels()
        for name in ("input_level", "fake_updates", "fake_lr", "max_grad_value"):
            value = getattr(self, name)
            check(name, value, value is None or value > 0, "more than 0, or None")
        if self.fake_betas is not None:
            check(
                "fake_betas", self.fake_betas, all(0 <= beta < 1 for beta in self.fake_betas), "two numbers in [0, 1)"
            )
        if self.hflip and not self.needs_images:
            raise ValueError(
                f"hflip is {self.hflip}, but method {self.method} has no discriminator and sees no images; leave it out"
            )
        if self.guidance != "none" and not has_classes:
            raise ValueError(f"guidance is {self.guidance}, but the model has no classes; add --class-conditional")


def _drawn(published: LevelDraw, levels: tuple[float, float] | None, kind: str | None) -> LevelDraw:
    """A draw of noise levels with what was asked for in place of what was published."""
    least, greatest = (published.least, published.greatest) if levels is None else levels
    return dataclasses.replace(published, kind=published.kind if kind is None else kind, least=least, greatest=greatest)
