"""``maskdm-fast demo``: masked pretraining and fine-tuning against training from scratch, for the same training time;
then a student of the first, which draws in one step.

Both arms train in turns, a slice of the budget at a time, so that a machine that slows down slows both. Only the
time inside the training loop counts: set-up, checkpoints, sampling and scoring do not.
"""

import dataclasses
import functools
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from maskdm_fast.data import ImageStore
from maskdm_fast.diffusion.mask_text import format_mask
from maskdm_fast.diffusion.masking import BlockMask, NoMask
from maskdm_fast.eval import (
    FeatureNetwork,
    cached_features,
    compare,
    compute_features,
    load_features,
    nearest,
    subset_indices,
)
from maskdm_fast.eval.report import write_report
from maskdm_fast.eval.results import NeighbourStrip, ReportData, RunResult, StageResult
from maskdm_fast.eval.summary import render_text, verdict
from maskdm_fast.models import CONFIGS, UViTConfig
from maskdm_fast.train import RunConfig, TrainResult, load_weights, read_metrics, train
from maskdm_fast.train.checkpoint import write_json_atomic
from maskdm_fast.train.config import (
    DenoisingConfig,
    DiffusionConfig,
    MachineConfig,
    OutputConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.extras import require
from maskdm_fast.train.generation import generate
from maskdm_fast.train.metrics import git_commit, machine, package_versions
from maskdm_fast.train.presets.distilled import emoji32_distill_sid
from maskdm_fast.train.progress import format_seconds, step_bar
from maskdm_fast.train.runs import default_cache_dir, make_folder, open_store
from maskdm_fast.train.signals import StopSignals
from maskdm_fast.train.world import make_world

_MASKED, _SCRATCH, _DISTILLED = "masked", "scratch", "distilled"
_NUM_SHOWN, _NUM_NEIGHBOURED = 64, 8
_OPTIONS_NAME, _SUMMARY_NAME, _REPORT_NAME = "demo.json", "summary.txt", "report.html"


@dataclass(frozen=True)
class DemoOptions:
    """Train a small model on emoji two ways for the same training time, and write a report that compares them.

    One arm pretrains on masked images and fine-tunes on whole ones, the other trains on whole images from the start.
    Same seed, same data. The first is then distilled into a generator of one step (SiD). An interrupted demo goes on
    where it stopped; of a finished one the summary is shown again.

    example: maskdm-fast demo --minutes 20 --out runs/longer-demo
    """

    smoke: bool = False
    """Do all of it in less than a minute, with a model too small to learn anything."""
    minutes: float | None = None
    """Training time of each arm, in minutes; the student takes half as long, and set-up, sampling and scoring come on
    top. Default: 1.75, --smoke 0.05."""
    out: str | None = None
    """Folder of the report and of all runs. Default: runs/demo (runs/demo-smoke with --smoke)."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:INDEX."""


@dataclass(frozen=True)
class Plan:
    """Everything that the size of a demo decides.

    Attributes:
        model: trained in both arms.
        pretrain, unmasked: the stages; scratch and fine-tuning differ in their first weights only.
        distill: what makes the student.
        seconds: training time of each arm.
        distill_seconds: of the student.
        pretrain_share: share of it for pretraining.
        rounds: slices that the budget is cut into.
        log_images: log interval of the masked stage; the unmasked ones log as often in time.
        num_samples: images drawn from each arm for the scores.
        num_steps: sampler steps of the arms.
        num_reference: real images that the scores use, None for all.
    """

    model: UViTConfig
    pretrain: DenoisingConfig
    unmasked: DenoisingConfig
    distill: ScoreDistillationConfig
    seconds: float
    distill_seconds: float
    pretrain_share: float
    rounds: int
    log_images: tuple[int, int]
    num_samples: int
    num_steps: int
    num_reference: int | None


def make_plan(options: DemoOptions) -> Plan:
    """The plan of a demo; ValueError if the time is not positive and finite."""
    minutes = options.minutes if options.minutes is not None else (0.05 if options.smoke else 1.75)
    if not 0 < 60.0 * minutes < math.inf:
        raise ValueError(f"--minutes is {options.minutes}, want more than 0, and finite")
    pretrain = DenoisingConfig(
        mask=BlockMask(0.75, 2 if options.smoke else 4),
        num_images=None,
        batch_size=64,
        lr=1e-3,
        warmup_images=2_000,
        ema_half_life_images=5_000,
    )
    unmasked = replace(pretrain, mask=NoMask(), batch_size=32, warmup_images=1_000, ema_half_life_images=2_500)
    return Plan(
        model=UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2)
        if options.smoke
        else CONFIGS["emoji32"],
        pretrain=pretrain,
        unmasked=unmasked,
        distill=replace(
            emoji32_distill_sid().stage,
            teacher=f"{_MASKED}/2-finetune",
            num_images=None,
            ema_half_life_images=1_000,
        ),
        seconds=60.0 * minutes,
        distill_seconds=30.0 * minutes,
        pretrain_share=0.5,
        rounds=2 if options.smoke else 4,
        log_images=(6_400, 3_200) if options.smoke else (2_560, 640),
        num_samples=64 if options.smoke else 256,
        num_steps=5 if options.smoke else 25,
        num_reference=256 if options.smoke else None,
    )


@dataclass(frozen=True)
class Demo:
    """One demo under way.

    Attributes:
        plan: its sizes.
        seed: of everything.
        folder: where it is saved.
        store: the training images.
    """

    plan: Plan
    seed: int
    folder: Path
    store: ImageStore

    @functools.cached_property
    def real(self) -> np.ndarray:
        """The real images that the scores use, in random order, uint8 ``[m, h, w, C]``."""
        total = len(self.store)
        return self.store.images[subset_indices(total, self.plan.num_reference or total, seed=self.seed).numpy()]


def run(options: DemoOptions) -> int:
    """Run the demo; returns the exit code."""
    started = time.monotonic()
    plan = make_plan(options)
    configs = _configs(plan, options)
    for config in configs.values():
        replace(config, stage=replace(config.stage, max_seconds=plan.seconds)).validate()
    folder = Path(options.out or ("runs/demo-smoke" if options.smoke else "runs/demo"))
    device = make_world(options.device).device
    # What is missing must show now, not after training.
    for module in ("torchmetrics", "jinja2", "matplotlib", "PIL"):
        require(module, "eval")
    network = load_features().to(device)
    make_folder(folder)
    _claim(folder, {"smoke": options.smoke, "seconds": plan.seconds, "seed": options.seed})
    summary_path = folder / _SUMMARY_NAME
    if summary_path.exists():
        print(summary_path.read_text("utf-8"))
        print(f"This demo was finished before; remove {folder} to run it again.")
        return 0
    demo = Demo(plan, options.seed, folder, open_store(configs[_SCRATCH]))
    if not _train(plan, configs, folder):
        print("Interrupted; the same command goes on.")
        return 0
    key = f"{demo.store.header.checksum}|{len(demo.real)}|{demo.seed}"
    reference = cached_features(demo.real, network, key=key, cache_dir=default_cache_dir())
    results = [_result(demo, name, network, reference) for name in (_MASKED, _SCRATCH, _DISTILLED)]
    data = _report(demo, results, started)
    write_report(data, folder / _REPORT_NAME)
    summary = render_text(data)
    print("\n" + summary)
    # Last, because it marks the demo as finished.
    summary_path.write_text(summary, encoding="utf-8")
    return 0


def _configs(plan: Plan, options: DemoOptions) -> dict[str, RunConfig]:
    """The runs by their folder inside the demo's."""
    fast, slow = plan.log_images

    def config(stage: DenoisingConfig | ScoreDistillationConfig, log_images: int) -> RunConfig:
        return RunConfig(
            seed=options.seed,
            model=plan.model,
            diffusion=DiffusionConfig(prediction="v"),
            machine=MachineConfig(device=options.device),
            # Each slice ends with a checkpoint, and a slice is short.
            output=OutputConfig(log_images=log_images, checkpoint_images=10**9, keep_checkpoints=1),
            stage=stage,
        )

    return {
        f"{_MASKED}/1-pretrain": config(plan.pretrain, fast),
        f"{_MASKED}/2-finetune": config(replace(plan.unmasked, init_from="1-pretrain"), slow),
        _SCRATCH: config(plan.unmasked, slow),
        _DISTILLED: config(plan.distill, slow),
    }


def _train(plan: Plan, configs: dict[str, RunConfig], folder: Path) -> bool:
    """Train both arms to the full budget, in turns, then the student; False if a signal came."""

    with StopSignals() as signals:

        def train_until(name: str, seconds: float) -> TrainResult:
            stage = replace(configs[name].stage, max_seconds=seconds)
            return train(replace(configs[name], stage=stage), folder / name, title=f"{name:<18}", signals=signals)

        for number in range(1, plan.rounds + 1):
            target = plan.seconds * number / plan.rounds
            pretrained = train_until(f"{_MASKED}/1-pretrain", min(target, plan.pretrain_share * plan.seconds))
            # The last step of a stage overruns its share a little; the next stage pays for it.
            if pretrained.finished and target > pretrained.seconds:
                train_until(f"{_MASKED}/2-finetune", target - pretrained.seconds)
            if signals.received or not train_until(_SCRATCH, target).finished:
                return False
        return train_until(_DISTILLED, plan.distill_seconds).finished


def _result(demo: Demo, name: str, network: FeatureNetwork, reference: Tensor) -> RunResult:
    """Sample and score one arm; `reference` holds the features of `demo.real`."""
    weights, plan = load_weights(demo.folder / name), demo.plan
    student = name == _DISTILLED
    with step_bar(f"sampling {name}") as progress:
        samples = generate(
            weights.config,
            weights.tensors,
            plan.num_samples,
            num_steps=None if student else plan.num_steps,
            seed=demo.seed,
            device=network.device,
            progress=progress,
        )
    features = compute_features(samples, network)
    shown = samples[:_NUM_NEIGHBOURED]
    neighbours = nearest(features[: len(shown)], reference, network, k=4)
    title, description = _words(plan, name)
    stages = ("1-pretrain", "2-finetune") if name == _MASKED else ("",)
    sampler = "one step" if student else f"DDIM, {plan.num_steps} steps"
    return RunResult(
        name=title,
        description=description,
        stages=_stages([demo.folder / name / stage for stage in stages]),
        samples=samples[:_NUM_SHOWN],
        samples_caption=f"EMA weights, {sampler}, seed {demo.seed}: the first of {len(samples)}, not chosen",
        scores=compare(features, reference, network, seed=demo.seed),
        neighbours=NeighbourStrip.of(shown, demo.real, neighbours, "1 - cosine of features"),
    )


def _words(plan: Plan, name: str) -> tuple[str, str]:
    """Name and description of a run in the report."""
    if name == _SCRATCH:
        return "from scratch, unmasked", "Whole images all the time."
    if name == _MASKED:
        mask = format_mask(plan.pretrain.mask)
        return (
            "masked pretrain + finetune",
            f"Mask {mask} for {plan.pretrain_share:.0%} of the time, then whole images.",
        )
    return (
        "its one-step student (SiD)",
        f"The first, distilled without data in {format_seconds(plan.distill_seconds)} minutes.",
    )


def _stages(folders: list[Path]) -> list[StageResult]:
    """The curves of the runs in `folders`, one after the other."""
    results: list[StageResult] = []
    images_before, seconds_before = 0, 0.0
    for folder in folders:
        checkpoint = load_weights(folder).checkpoint
        images, seconds = checkpoint.state["images"], checkpoint.state["seconds"]
        stage = load_weights(folder).config.stage
        denoises = isinstance(stage, DenoisingConfig)
        points = [
            (images_before + record["images"], seconds_before + record["seconds"], record["loss"])
            for record in read_metrics(folder)
            if record["kind"] == "log" and denoises  # the loss of another kind is another number
        ]
        results.append(
            StageResult(
                name=folder.name.partition("-")[2] or folder.name,
                description=f"{f'mask {format_mask(stage.mask)}' if denoises else stage.method}, "
                f"batch {stage.batch_size}, lr {stage.lr:g}",
                points=points,
                images=images,
                seconds=seconds,
                path=str(folder),
            )
        )
        images_before, seconds_before = images_before + images, seconds_before + seconds
    return results


def _report(demo: Demo, results: list[RunResult], started: float) -> ReportData:
    versions = {name: version for name, version in package_versions().items() if version}
    about, store = machine(), demo.store
    return ReportData(
        title="maskdm_fast demo",
        lead=(
            f"One model, trained twice for {format_seconds(demo.plan.seconds)} minutes on the same images, from one "
            "seed: once on masked images and then on whole ones, once on whole images from the start. The two took "
            "turns on the machine; set-up, checkpoints, sampling and scoring are not counted. Then the first was "
            "distilled into a generator that needs one evaluation of the network for an image."
        ),
        runs=results,
        verdict=_verdict(demo.plan, results),
        real=demo.real[:_NUM_SHOWN],
        real_caption=f"training images at random, {store.image_size} px",
        facts={
            "data": f"{store.header.source}, {len(store):,} images at {store.image_size} px",
            "model": ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(demo.plan.model).items()),
            "seed": str(demo.seed),
            "machine": f"{about['cpu']}, {about['devices']['cpu']['threads']} threads",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "commit": git_commit() or "not a checkout",
            "command": shlex.join(["maskdm-fast", *sys.argv[1:]]),
            "time": f"{format_seconds(time.monotonic() - started)} minutes in all",
        },
        paths={
            "report": str(demo.folder / _REPORT_NAME),
            "summary": str(demo.folder / _SUMMARY_NAME),
            **{f"run, {result.name}": result.stages[-1].path for result in results},
        },
        attribution=store.header.attribution,
    )


def _verdict(plan: Plan, results: list[RunResult]) -> str:
    """Which arm came out ahead, and what the student loses or wins."""
    *arms, student = results
    teacher = arms[0].scores
    return (
        f"{verdict(ReportData('', '', arms))} The student of the first draws in one step instead of {plan.num_steps}: "
        f"{student.scores.fd_name} {student.scores.fd:.1f} against its teacher's {teacher.fd:.1f}."
    )


def _claim(folder: Path, options: dict[str, object]) -> None:
    """Remember what the folder's demo is; ValueError if it was begun as another."""
    path = folder / _OPTIONS_NAME
    if not path.exists():
        write_json_atomic(path, options)
        return
    try:
        begun = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); choose another folder with --out, or remove {folder}"
        ) from error
    if begun != options:
        raise ValueError(
            f"the demo in {folder} was begun with {begun}, now it is {options}; choose another folder with --out, or "
            f"remove {folder}"
        )
