"""Configurations of stages: what all have in common, and denoising."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.mask_text import format_mask
from maskdm_fast.diffusion.masking import Mask, NoMask
from maskdm_fast.models import UViTConfig


def check(name: str, value: Any, good: bool, want: str) -> None:
    """Raise ValueError unless `good`."""
    if not good:
        raise ValueError(f"{name} is {value}, want {want}")


@dataclass(frozen=True)
class StageConfig:
    """What every stage is configured with.

    Attributes:
        kind: the word for the stage in config.json.
        makes_denoiser: whether its network denoises at every noise level, so that it can be a teacher.
    """

    kind: ClassVar[str]
    makes_denoiser: ClassVar[bool] = True

    num_images: int | None = 1_000_000
    """Stop after this many training images (repeats of an image count); raise it to continue a finished run. None: no
    limit but --max-seconds."""
    max_seconds: float | None = None
    """Stop after this many seconds of training, counted over all resumes, without set-up, checkpoints and previews."""
    batch_size: int = 128
    """Images per optimizer step, over all processes."""
    optimizer: Literal["adamw", "lamb"] = "adamw"
    """adamw; lamb scales the step of each tensor to its norm, which keeps very large batches stable."""
    lr: float = 2e-4
    """Learning rate after the warm-up; constant from there on."""
    warmup_images: int = 0
    """Linear warm-up: step k = 1, 2, ... uses lr * min(1, k * batch_size / warmup_images), so even step 1 learns."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's first and second moment."""
    weight_decay: float = 0.03
    """Decoupled weight decay; each step shrinks the weights by lr * weight_decay."""
    max_grad_norm: float | None = 1.0
    """Scale the gradient down to this global L2 norm; None: never."""
    ema_half_life_images: int = 100_000
    """Half-life of the weights' moving average: decay per update = 0.5 ** (images / ema_half_life_images), with the
    images of one update: a batch, but where a distillation makes more or fewer updates of the student than batches."""
    hflip: float = 0.0
    """Probability of mirroring an image left to right."""
    class_balance: float = 0.0
    """How evenly classes are shown: class c has a share ~ n_c ** (1 - class_balance), so 0 shows them as they are and
    1 all equally often. The data set must have classes, the model need not."""
    init_from: str | None = None
    """Start from the weights of this run or checkpoint folder, with a fresh optimizer and moving average; or of a
    checkpoint file of the official MaskDM or U-ViT code. Another image or patch size is made to fit. A relative path is
    looked up beside the run folder first, then in the working directory."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Which weights of `init_from`: the moving average, or the trained weights themselves."""

    @property
    def images_per_update(self) -> float:
        """Training images from one update of the averaged network to the next."""
        return self.batch_size

    @property
    def ema_decay(self) -> float:
        """EMA decay per update of the averaged network, ``0.5 ** (images_per_update / ema_half_life_images)``."""
        return 0.5 ** (self.images_per_update / self.ema_half_life_images)

    @property
    def sampling_steps(self) -> int:
        """Steps of the sampler unless told otherwise."""
        return 50

    @property
    def needs_images(self) -> bool:
        """Whether it learns from images of a data set."""
        return True

    @property
    def can_be_guided(self) -> bool:
        """Whether its network learns images both with and without their class."""
        return False

    def check_guidable(self, who: str) -> None:
        """Raise ValueError, which begins with `who`, unless its network can be guided."""
        if not self.can_be_guided:
            raise ValueError(
                f"{who} was not trained both with and without classes, so it cannot be guided: leave out guidance, or "
                "train it with label_drop, 0.1 for example"
            )

    def warm(self, lr: float, step: int) -> float:
        """The learning rate that `lr` is after the warm-up, for the step that follows `step` finished ones."""
        if self.warmup_images == 0:
            return lr
        return lr * min(1.0, (step + 1) * self.batch_size / self.warmup_images)

    def lr_at(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished ones."""
        return self.warm(self.lr, step)

    def validate(self, model: UViTConfig, *, has_classes: bool) -> None:
        """Raise ValueError for the first value that cannot work with `model`, which is told classes or not."""
        for name in ("batch_size", "lr", "ema_half_life_images"):
            check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        if self.num_images is None and self.max_seconds is None:
            raise ValueError("num_images and max_seconds are both None, so the run would never end; set one of them")
        for name in ("num_images", "max_seconds", "max_grad_norm"):
            value = getattr(self, name)
            check(name, value, value is None or value > 0, "more than 0, or None")
        for name in ("warmup_images", "weight_decay"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        check("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        for name in ("hflip", "class_balance"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number from 0 to 1")


@dataclass(frozen=True)
class DenoisingConfig(StageConfig):
    """One stage of denoising training: pretraining with a mask, or fine-tuning and training from scratch without."""

    kind: ClassVar[str] = "denoising"

    mask: Mask = field(default_factory=NoMask)
    """Which patches are hidden. RATIO: share of patches masked, or LOW-HIGH, from which each image draws its own; SIDE:
    side of a block or of the kept window, in patches."""
    mask_schedule: MaskSchedule = field(default_factory=MaskSchedule)
    """How RATIO goes on from that of the mask: RATIO@IMAGES is reached once so many images are done, in steps or on a
    line or a cosine. linear:0@200000 ends unmasked; steps:0.5@100000,0@150000 takes two steps there."""
    unmasked_share: float = 0.0
    """Probability, for each image by itself, of training it whole in spite of the mask."""
    label_drop: float = 0.0
    """Probability of training an image without its class, which guidance needs; only with --class-conditional."""

    @property
    def can_be_guided(self) -> bool:
        """See `StageConfig`."""
        return self.label_drop > 0.0

    def mask_at(self, step: int) -> Mask:
        """Mask of the optimizer step that follows `step` finished ones."""
        return self.mask_schedule.mask_at(self.mask, step * self.batch_size)

    def validate(self, model: UViTConfig, *, has_classes: bool) -> None:
        """As `StageConfig`."""
        side = model.image_size // model.patch_size
        self.mask.validate((side, side))
        self.mask_schedule.validate(self.mask)
        if model.final_conv and self.mask != NoMask():
            raise ValueError(
                f"mask is {format_mask(self.mask)}, but the model has a final convolution, which needs whole images; "
                "pretrain with final_conv=False, and switch it on for the unmasked stage, which adds it as the identity"
            )
        super().validate(model, has_classes=has_classes)
        check("unmasked_share", self.unmasked_share, 0 <= self.unmasked_share <= 1, "a number from 0 to 1")
        # Of 1 no class would be trained.
        check("label_drop", self.label_drop, 0 <= self.label_drop < 1, "a number from 0 to 1, and less than 1")
        if self.unmasked_share and self.mask == NoMask():
            raise ValueError(f"unmasked_share is {self.unmasked_share}, but all images are whole; set a mask")
        if self.label_drop and not has_classes:
            raise ValueError(f"label_drop is {self.label_drop}, but the model has no classes; add --class-conditional")
