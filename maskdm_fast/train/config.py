"""Typed configurations of training runs.

A `RunConfig` describes one run folder: one model, one data set, one stage. A `Recipe` is several stages that share
everything but the stage, each continued from the one before it. Progress and intervals are counted in images, so
that they keep their meaning when the batch size changes.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from maskdm_fast.data import LatentScaling
from maskdm_fast.diffusion import LossWeight, NoiseSchedule, TimestepDraw, make_schedule
from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.mask_text import format_mask
from maskdm_fast.diffusion.masking import Mask, NoMask
from maskdm_fast.models import CONFIGS, UViTConfig
from maskdm_fast.random import check_seed
from maskdm_fast.train.config_json import from_json, to_json


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process and what the network predicts."""

    schedule: Literal["linear", "cosine", "shifted-cosine", "vp", "flow", "edm"] = "cosine"
    """Noise schedule: linear and cosine over 1000 time steps, cosine shifted by the image size, or in continuous time
    the VP-SDE, rectified flow, EDM."""
    prediction: Literal["eps", "x0", "v", "flow", "edm"] = "eps"
    """What the network predicts: the noise, the clean image, or v = alpha * eps - sigma * x0; flow (eps - x0) or x0
    with schedule flow; edm (the preconditioned network) or x0 with schedule edm."""
    loss_weight: Literal["none", "min-snr", "p2", "edm"] = "none"
    """Weight of the loss by noise level; none: 1 on what the network predicts."""
    min_snr_gamma: float = 5.0
    """min-snr: the error of x0 counts min(snr, gamma)."""
    p2_gamma: float = 1.0
    """p2: the error of the noise counts 1 / (k + snr) ** gamma."""
    p2_k: float = 1.0
    """p2: see above."""
    timesteps: Literal["uniform", "lognormal"] = "uniform"
    """How training times are drawn: uniformly, or with ln(sigma/alpha) normally distributed."""
    lognormal_mean: float = -1.2
    """lognormal: mean of ln(sigma/alpha)."""
    lognormal_std: float = 1.2
    """lognormal: standard deviation of ln(sigma/alpha)."""
    stratified: bool = False
    """Spread the times of each batch evenly, which makes its loss less noisy."""

    def noise_schedule(self, model: UViTConfig) -> NoiseSchedule:
        """The schedule, for images of the size of `model`."""
        return make_schedule(self.schedule, model.image_size)

    def weight(self) -> LossWeight:
        """The weight of the loss."""
        return LossWeight(self.loss_weight, self.min_snr_gamma, self.p2_gamma, self.p2_k)

    def draw(self, batch_size: int) -> TimestepDraw:
        """The draw of training times for global batches of this size."""
        num_strata = batch_size if self.stratified else None
        return TimestepDraw(self.timesteps, self.lognormal_mean, self.lognormal_std, num_strata)

    def validate(self, model: UViTConfig) -> None:
        """Raise ValueError for the first value that cannot work, alone or with the others."""
        predictions = self.noise_schedule(model).predictions
        if self.prediction not in predictions:
            raise ValueError(
                f"prediction {self.prediction} does not go with schedule {self.schedule}; "
                f"want --prediction {' or '.join(predictions)}"
            )
        self.weight()
        self.draw(batch_size=1)


@dataclass(frozen=True)
class DenoisingConfig:
    """One stage of denoising training: pretraining with a mask, or fine-tuning and training from scratch without."""

    mask: Mask = field(default_factory=NoMask)
    """Which patches are hidden. RATIO: share of patches masked, or LOW-HIGH, from which each image draws its own; SIDE:
    side of a block or of the kept window, in patches."""
    mask_schedule: MaskSchedule = field(default_factory=MaskSchedule)
    """How RATIO goes on from that of the mask: RATIO@IMAGES is reached once so many images are done, in steps or on a
    line or a cosine. linear:0@200000 ends unmasked; steps:0.5@100000,0@150000 takes two steps there."""
    unmasked_share: float = 0.0
    """Probability, for each image by itself, of training it whole in spite of the mask."""
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
    """Half-life of the weights' moving average: decay per step = 0.5 ** (batch_size / ema_half_life_images)."""
    hflip: float = 0.0
    """Probability of mirroring an image left to right."""
    label_drop: float = 0.0
    """Probability of training an image without its class, which guidance needs; only with --class-conditional."""
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
    def ema_decay(self) -> float:
        """EMA decay per optimizer step, ``0.5 ** (batch_size / ema_half_life_images)``."""
        return 0.5 ** (self.batch_size / self.ema_half_life_images)

    def lr_at(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished ones."""
        if self.warmup_images == 0:
            return self.lr
        return self.lr * min(1.0, (step + 1) * self.batch_size / self.warmup_images)

    def mask_at(self, step: int) -> Mask:
        """Mask of the optimizer step that follows `step` finished ones."""
        return self.mask_schedule.mask_at(self.mask, step * self.batch_size)

    def validate(self, model: UViTConfig) -> None:
        """Raise ValueError for the first value that cannot work with `model`."""
        side = model.image_size // model.patch_size
        self.mask.validate((side, side))
        self.mask_schedule.validate(self.mask)
        if model.final_conv and self.mask != NoMask():
            raise ValueError(
                f"mask is {format_mask(self.mask)}, but the model has a final convolution, which needs whole images; "
                "pretrain with final_conv=False, and switch it on for the unmasked stage, which adds it as the identity"
            )
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
        for name in ("hflip", "label_drop", "class_balance", "unmasked_share"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        if self.unmasked_share and self.mask == NoMask():
            raise ValueError(f"unmasked_share is {self.unmasked_share}, but all images are whole; set a mask")


@dataclass(frozen=True)
class MachineConfig:
    """Where and how the work is done. May change when a run is resumed: it alters results by rounding at most."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:INDEX. Of several processes each takes the GPU of its own."""
    engine: Literal["auto", "plain", "ddp", "zero1", "zero2", "zero3", "zero3-offload"] = "auto"
    """How training is spread over processes: plain (one process); ddp (each holds everything, they share the work);
    DeepSpeed ZeRO, where zero1 divides optimizer and moving average among them, zero2 also gradients, zero3 also
    weights, zero3-offload in the memory of the CPU. auto: the first of them whose memory is estimated to fit."""
    micro_batch_size: int | None = None
    """Images per forward pass; the gradients of a batch are accumulated. None: the whole batch at once."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the network's blocks for the backward pass and compute the rest again: a fraction of the
    memory for about a third more arithmetic."""
    compile: bool = False
    """Compile the network's blocks with torch.compile; the first steps wait for the compiler."""
    optimizer_kernel: Literal["maskdm_fast", "apex"] = "maskdm_fast"
    """Who computes the optimizer's step: one kernel of ours, or NVIDIA apex's FusedAdam with the moving average beside
    it. The checkpoints are the same."""
    layer_norm: Literal["pytorch", "apex"] = "pytorch"
    """Who computes the layer norms: PyTorch, or NVIDIA apex's FusedLayerNorm."""
    cuda_graph: bool = False
    """On a GPU with plain or ddp: record forward and backward pass once and replay them, which frees the host from
    launching them one by one."""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """Where the packed images are kept: memory-mapped (cpu), or whole in the memory of the GPU (device). auto: there if
    they fit easily."""
    stall_seconds: float = 600.0
    """Report rank and stack of a step that takes longer, and end the process when it takes twice as long."""
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
    score_images: int = 0
    """Score samples of the averaged weights each time this many more images are done, and at the end; 0: never. The
    scores go to metrics.jsonl."""
    score_num_images: int = 1_000
    """How many images are sampled for a score; compare scores of one number only."""
    score_steps: int = 50
    """Steps of the DDIM sampler for a score."""
    score_features: str = "lite0"
    """Feature network of the scores: lite0, or the TorchScript file of the FID Inception."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where else metrics and previews go: tensorboard (the run folder's tensorboard/), wandb (as its environment
    variables say: WANDB_PROJECT, WANDB_MODE=offline, ...)."""

    def validate(self) -> None:
        """Raise ValueError for the first value out of its range."""
        for name in ("log_images", "checkpoint_images", "keep_checkpoints", "score_steps"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        for name in ("preview_images", "score_images"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("score_num_images", self.score_num_images, self.score_num_images >= 2, "at least 2")


@dataclass(frozen=True)
class SharedConfig:
    """What the stages of a recipe have in common."""

    data: str = "emoji"
    """Data set: emoji; a folder of images (sub-folders are classes); MNIST-style idx files (the folder, or the file of
    images; --channels 1 keeps them grey); WebDataset tar shards (their folder, one file, or "set-{000..099}.tar");
    latents (.npy, .npz, .safetensors, or a folder of them, with --latent-scale); or a packed .store file."""
    decoding: Literal["packed", "on-the-fly"] = "packed"
    """packed: decode all images once, into the cache folder. on-the-fly: decode the images of tar shards each time they
    are shown, where they are too many to be kept decoded."""
    latent_scale: float | None = None
    """Of latents z: train on (z - shift) * scale. A packed store knows its own."""
    latent_shift: float = 0.0
    """See above."""
    latent_bound: float | None = None
    """Of latents: samplers clip (z - shift) * scale to this absolute value. None: the largest of the data set."""
    data_share: float = 1.0
    """Train on this share of the images, more than 0 and at most 1; the same ones whatever the seed."""
    skip_bad: bool = False
    """Leave out image files that cannot be read (they are listed), instead of stopping."""
    seed: int = 0
    """Seed of every random draw: initial weights, data order, masks, time steps, noise. Stage n of a recipe uses
    seed + n - 1."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: matrix products in 16 bits, fp16 with a loss scale; the trained weights, optimizer and loss stay
    float32."""
    class_conditional: bool = False
    """Tell the network the class of each image; --num-classes is then taken from the data set."""
    model: UViTConfig = CONFIGS["emoji32"]
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(frozen=True)
class RunConfig(SharedConfig):
    """One run: one folder, one stage."""

    stage: DenoisingConfig = field(default_factory=DenoisingConfig)

    @property
    def latents(self) -> LatentScaling | None:
        """How latents are scaled; None for images, and for a packed store that was not opened yet."""
        return None if self.latent_scale is None else LatentScaling(self.latent_scale, self.latent_shift)

    def validate(self) -> None:
        """Raise ValueError for the first value that cannot work, before anything is read or written."""
        check_seed(self.seed)
        if self.latents is not None:
            self.latents.check()
            bound = self.latent_bound
            _check("latent_bound", bound, bound is None or bound > 0, "more than 0, or None")
            for part, name in ((self.stage, "hflip"), (self.output, "preview_images"), (self.output, "score_images")):
                value = getattr(part, name)
                _check(f"the data set holds latents; {name}", value, not value, _NO_LATENTS[name])
        self.diffusion.validate(self.model)
        self.stage.validate(self.model)
        self.output.validate()
        micro = self.machine.micro_batch_size
        _check("micro_batch_size", micro, micro is None or micro > 0, "more than 0, or None")
        stall = self.machine.stall_seconds
        _check("stall_seconds", stall, stall > 0, "more than 0")
        _check("data_share", self.data_share, 0 < self.data_share <= 1, "more than 0 and at most 1")
        if self.machine.optimizer_kernel == "apex" and (self.stage.optimizer != "adamw" or self.precision == "fp16"):
            raise ValueError(
                f"optimizer_kernel apex computes AdamW without a loss scale, but the run has optimizer "
                f"{self.stage.optimizer} and precision {self.precision}; leave it out"
            )
        if self.stage.label_drop and not (self.class_conditional or self.model.num_classes):
            raise ValueError(
                f"label_drop is {self.stage.label_drop}, but the model has no classes; add --class-conditional"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `from_dict` reads it back."""
        return to_json(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Read what `to_dict` wrote; keys that are missing take their defaults.

        Raises:
            ValueError: a key is unknown, as when a later version of the package wrote it.
        """
        return from_json(cls, values)


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


_NO_PICTURES = "0: pictures of latents need their autoencoder, which is not part of this package"
_NO_LATENTS = {
    "hflip": "0: a mirrored latent is not that of the mirrored image, so add latents of mirrored images to the set",
    "preview_images": _NO_PICTURES,
    "score_images": _NO_PICTURES,
}


def _check(name: str, value: Any, good: bool, want: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value}, want {want}")
