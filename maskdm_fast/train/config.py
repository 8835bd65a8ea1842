"""Typed configurations of training runs.

A `RunConfig` describes one run folder: one model, one data set, one stage. A `Recipe` is several stages that share
everything but the stage, each continued from the one before it. Progress and intervals are counted in images, so
that they keep their meaning when the batch size changes.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from maskdm_fast.diffusion.masking import BlockMask, CropMask, Mask, NoMask, PatchMask
from maskdm_fast.models import CONFIGS, UViTConfig
from maskdm_fast.random import check_seed

MASK_SYNTAX = "none|patch:RATIO|block:RATIO:SIDE|crop:SIDE"


def parse_mask(text: str) -> Mask:
    """Read a mask from its text form, for example ``patch:0.9``, ``block:0.9:4``, ``crop:5`` or ``none``.

    RATIO is the share of patches masked, in [0, 1); SIDE the side in patches of a block, or of the window that is kept.

    Raises:
        ValueError: `text` is none of these.
    """
    kind, *values = text.split(":")
    try:
        if kind == "none" and not values:
            return NoMask()
        if kind == "patch" and len(values) == 1:
            return PatchMask(float(values[0]))
        if kind == "block" and len(values) == 2:
            return BlockMask(float(values[0]), int(values[1]))
        if kind == "crop" and len(values) == 1:
            return CropMask(int(values[0]))
    except ValueError as error:
        raise ValueError(f"mask {text!r}: {error}; want {MASK_SYNTAX}") from None
    raise ValueError(f"mask {text!r} is not understood; want {MASK_SYNTAX}, for example patch:0.9 or block:0.9:4")


def format_mask(mask: Mask) -> str:
    """The text form of `mask`, which `parse_mask` reads back."""
    if isinstance(mask, PatchMask):
        return f"patch:{mask.ratio}"
    if isinstance(mask, BlockMask):
        return f"block:{mask.ratio}:{mask.block_size}"
    if isinstance(mask, CropMask):
        return f"crop:{mask.size}"
    return "none"


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process and what the network predicts."""

    schedule: Literal["linear", "cosine"] = "cosine"
    """Noise schedule over 1000 time steps."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network predicts: the noise, the clean image, or v = alpha * eps - sigma * x0."""


@dataclass(frozen=True)
class DenoisingConfig:
    """One stage of denoising training: pretraining with a mask, or fine-tuning and training from scratch without."""

    mask: Mask = field(default_factory=NoMask)
    """Which patches are hidden. RATIO: share of patches masked; SIDE: side of a block or of the kept window, in
    patches."""
    num_images: int | None = 1_000_000
    """Stop after this many training images (repeats of an image count); raise it to continue a finished run. None: no
    limit but --max-seconds."""
    max_seconds: float | None = None
    """Stop after this many seconds of training, counted over all resumes, without set-up, checkpoints and previews."""
    batch_size: int = 128
    """Images per optimizer step, over all processes."""
    lr: float = 2e-4
    """Learning rate of AdamW after the warm-up; constant from there on."""
    warmup_images: int = 0
    """Linear warm-up: step k = 1, 2, ... uses lr * min(1, k * batch_size / warmup_images), so even step 1 learns."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's first and second moment."""
    weight_decay: float = 0.03
    """Decoupled weight decay; each step shrinks the weights by lr * weight_decay."""
    max_grad_norm: float | None = 1.0
    """Scale the gradient down to this global L2 norm; None: never."""
    ema_half_life_images: int = 100_000
    """Half-life of the weights' moving average: decay per step = 0.5 ** (batch_size / ema_half_life_images)."""
    hflip: float = 0.0
    """Probability of mirroring an image left to right."""
    label_drop: float = 0.0
    """Probability of training an image without its class; only for a model with num_classes > 0."""
    init_from: str | None = None
    """Start from the weights of this run or checkpoint folder, with a fresh optimizer and moving average. A relative
    path is looked up beside the run folder first, then in the working directory."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Which weights of `init_from`: the moving average, or the trained weights themselves."""

    @property
    def ema_decay(self) -> float:
        """EMA decay per optimizer step, ``0.5 ** (batch_size / ema_half_life_images)``."""
        return 0.5 ** (self.batch_size / self.ema_half_life_images)

    def lr_at(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished ones."""
        if self.warmup_images == 0:
            return self.lr
        return self.lr * min(1.0, (step + 1) * self.batch_size / self.warmup_images)

    def validate(self, model: UViTConfig) -> None:
        """Raise ValueError for the first value that cannot work with `model`."""
        side = model.image_size // model.patch_size
        self.mask.validate((side, side))
        for name in ("batch_size", "lr", "ema_half_life_images"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        if self.num_images is None and self.max_seconds is None:
            raise ValueError("num_images and max_seconds are both None, so the run would never end; set one of them")
        for name in ("num_images", "max_seconds", "max_grad_norm"):
            value = getattr(self, name)
            _check(name, value, value is None or value > 0, "more than 0, or None")
        for name in ("warmup_images", "weight_decay"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        for name in ("hflip", "label_drop"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a probability, 0 to 1")
        if self.label_drop and not model.num_classes:
            raise ValueError(f"label_drop is {self.label_drop}, but the model has no classes; set num_classes")


@dataclass(frozen=True)
class MachineConfig:
    """Where and how the work is done. May change when a run is resumed: it alters results by rounding at most."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:INDEX."""
    micro_batch_size: int | None = None
    """Images per forward pass; the gradients of a batch are accumulated. None: the whole batch at once."""
    cache_dir: str | None = None
    """Where packed data sets are kept; None: $XDG_CACHE_HOME/maskdm_fast, or ~/.cache/maskdm_fast."""


@dataclass(frozen=True)
class OutputConfig:
    """What is written while training. May change when a run is resumed."""

    log_images: int = 10_000
    """Write a line to metrics.jsonl each time this many more images are done (rounded to whole steps)."""
    checkpoint_images: int = 200_000
    """Write a checkpoint each time this many more images are done; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    preview_images: int = 0
    """Images in the grid that is sampled to samples/ after each checkpoint; 0: none."""

    def validate(self) -> None:
        """Raise ValueError for the first value out of its range."""
        for name in ("log_images", "checkpoint_images", "keep_checkpoints"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        _check("preview_images", self.preview_images, self.preview_images >= 0, "at least 0")


@dataclass(frozen=True)
class SharedConfig:
    """What the stages of a recipe have in common."""

    data: str = "emoji"
    """Data set: emoji, or a folder of images (sub-folders are classes)."""
    skip_bad: bool = False
    """Leave out image files that cannot be read (they are listed), instead of stopping."""
    seed: int = 0
    """Seed of every random draw: initial weights, data order, masks, time steps, noise. Stage n of a recipe uses
    seed + n - 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 (autocast); weights, optimizer and loss stay float32."""
    model: UViTConfig = CONFIGS["emoji32"]
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(frozen=True)
class RunConfig(SharedConfig):
    """One run: one folder, one stage."""

    stage: DenoisingConfig = field(default_factory=DenoisingConfig)

    def validate(self) -> None:
        """Raise ValueError for the first value that cannot work, before anything is read or written."""
        check_seed(self.seed)
        self.stage.validate(self.model)
        self.output.validate()
        micro = self.machine.micro_batch_size
        _check("micro_batch_size", micro, micro is None or micro > 0, "more than 0, or None")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `from_dict` reads it back."""
        return _to_json(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Read what `to_dict` wrote; keys that are missing take their defaults.

        Raises:
            ValueError: a key is unknown, as when a later version of the package wrote it.
        """
        return _from_json(cls, values)


@dataclass(frozen=True)
class Recipe(SharedConfig):
    """Several stages in order, each initialised from the one before; each runs in its own sub-folder."""

    stages: tuple[tuple[str, DenoisingConfig], ...] = ()

    def runs(self) -> list[tuple[str, RunConfig]]:
        """The runs in order, as (sub-folder name such as ``1-pretrain``, configuration)."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(SharedConfig)}
        runs: list[tuple[str, RunConfig]] = []
        for number, (name, stage) in enumerate(self.stages, start=1):
            if runs and stage.init_from is None:
                stage = dataclasses.replace(stage, init_from=runs[-1][0])
            # Another seed for each stage: no stage repeats the noise and the masks of the one before it.
            stage_shared = {**shared, "seed": self.seed + number - 1}
            runs.append((f"{number}-{name}", RunConfig(**stage_shared, stage=stage)))
        return runs

    def validate(self) -> None:
        """Raise ValueError for the first value of any stage that cannot work."""
        for _, run in self.runs():
            run.validate()


MAY_CHANGE = ("stage.num_images", "stage.max_seconds", "machine", "output")
"""What may differ when a run folder is resumed; everything else decides the result and is fixed."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``key: old value -> new value`` for the values that may not change between two `RunConfig.to_dict`
    results."""
    old, new = _flatten(old), _flatten(new)
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]


def _check(name: str, value: Any, good: bool, want: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value}, want {want}")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _to_json(value: Any) -> Any:
    if isinstance(value, Mask):
        return format_mask(value)
    if dataclasses.is_dataclass(value):
        return {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _from_json(kind: Any, value: Any) -> Any:
    if kind == Mask:
        return parse_mask(value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no {', '.join(sorted(unknown))}; another version of the package wrote it"
            )
        # Keys that are newer than the file take their defaults.
        return kind(**{name: _from_json(hints[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value
