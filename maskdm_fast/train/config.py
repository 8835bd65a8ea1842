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
from maskdm_fast.models import CONFIGS, UViTConfig
from maskdm_fast.random import check_seed
from maskdm_fast.train.config_json import check_finite, from_json, to_json
from maskdm_fast.train.distill_config import DistillationConfig, ScoreDistillationConfig
from maskdm_fast.train.policy_config import PolicyDistillationConfig
from maskdm_fast.train.regression_config import RegressionConfig
from maskdm_fast.train.stage_config import DenoisingConfig, check

AnyStage = DenoisingConfig | ScoreDistillationConfig | RegressionConfig | PolicyDistillationConfig
"""Configurations of stages; in config.json their `kind` tells them apart."""

NO_DATA = "none"
"""In the place of a data set."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process and what the network predicts."""

    schedule: Literal["linear", "scaled-linear", "cosine", "shifted-cosine", "vp", "flow", "edm"] = "cosine"
    """Noise schedule: linear, scaled-linear (of latent diffusion) and cosine over 1000 time steps, cosine shifted by
    the image size, or in continuous time the VP-SDE, rectified flow, EDM."""
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
    offload_idle: bool = False
    """Of networks that are trained in turn, as in distillation: keep the state of those optimizers that wait in the
    memory of the CPU."""
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
            check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        for name in ("preview_images", "score_images"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        check("score_num_images", self.score_num_images, self.score_num_images >= 2, "at least 2")


@dataclass(frozen=True)
class SharedConfig:
    """What the stages of a recipe have in common."""

    data: str = "emoji"
    """Data set: emoji; a folder of images (sub-folders are classes); MNIST-style idx files (the folder, or the file of
    images; --channels 1 keeps them grey); WebDataset tar shards (their folder, one file, or "set-{000..099}.tar");
    latents (.npy, .npz, .safetensors, or a folder of them, with --latent-scale); a packed .store file; or none, where
    the teacher is all there is to learn from."""
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

    stage: AnyStage = field(default_factory=DenoisingConfig)

    @property
    def latents(self) -> LatentScaling | None:
        """How latents are scaled; None for images, and for a packed store that was not opened yet."""
        return None if self.latent_scale is None else LatentScaling(self.latent_scale, self.latent_shift)

    def validate(self) -> None:
        """Raise ValueError for the first value that cannot work, before anything is read or written."""
        check_seed(self.seed)
        check_finite(self.to_dict())
        bound = self.latent_bound
        check("latent_bound", bound, bound is None or bound > 0, "more than 0, or None")
        if self.latents is None:
            check("there is no latent_scale, and latent_shift", self.latent_shift, not self.latent_shift, "0")
        else:
            self.latents.check()
            for part, name in ((self.stage, "hflip"), (self.output, "preview_images"), (self.output, "score_images")):
                value = getattr(part, name)
                wish = f"latent_scale is {self.latent_scale}, which only latents have; {name}"
                check(wish, value, not value, _NO_LATENTS[name])
        self.diffusion.validate(self.model)
        self.stage.validate(self.model, has_classes=self.class_conditional or self.model.num_classes > 0)
        self.output.validate()
        micro = self.machine.micro_batch_size
        check("micro_batch_size", micro, micro is None or micro > 0, "more than 0, or None")
        stall = self.machine.stall_seconds
        check("stall_seconds", stall, stall > 0, "more than 0")
        check("data_share", self.data_share, 0 < self.data_share <= 1, "more than 0 and at most 1")
        if self.data == NO_DATA and (self.stage.needs_images or self.output.score_images):
            who = "the scores compare with" if self.output.score_images else f"{self.stage.kind} learns from"
            raise ValueError(f"data is {NO_DATA}, but {who} images; want a data set")
        if self.machine.optimizer_kernel == "apex" and (self.stage.optimizer != "adamw" or self.precision == "fp16"):
            raise ValueError(
                f"optimizer_kernel apex computes AdamW without a loss scale, but the run has optimizer "
                f"{self.stage.optimizer} and precision {self.precision}; leave it out"
            )
        if isinstance(self.stage, PolicyDistillationConfig) and self.precision == "fp16":
            raise ValueError(
                "policy distillation steps the policy's network and its noise after one backward pass, for which there "
                "is no common loss scale; use --precision bf16"
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
    """Several stages in order, each in its own sub-folder, and initialised from the one before or, if it distils,
    taught by it."""

    stages: tuple[tuple[str, AnyStage], ...] = ()

    def runs(self) -> list[tuple[str, RunConfig]]:
        """The runs in order, as (sub-folder name such as ``1-pretrain``, configuration)."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(SharedConfig)}
        runs: list[tuple[str, RunConfig]] = []
        for number, (name, stage) in enumerate(self.stages, start=1):
            before = runs[-1][0] if runs else None
            if isinstance(stage, DistillationConfig):
                if before is not None:
                    stage = dataclasses.replace(stage, teacher=before)
            elif stage.init_from is None:
                stage = dataclasses.replace(stage, init_from=before)
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
