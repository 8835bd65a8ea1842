"""What `benchmarks.time_to_quality` trains: arms, the steps that their budget buys, and the runs that arms share.

Letters: B budget in seconds, f fraction of it, s share of it that an arm spends on masked images, tau time of a step.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskdm_fast.data import ImageStore, open_dataset
from maskdm_fast.diffusion.mask_text import format_mask, parse_mask
from maskdm_fast.diffusion.masking import Mask, NoMask
from maskdm_fast.models import UViTConfig
from maskdm_fast.train import PRESETS, Recipe, RunConfig
from maskdm_fast.train.checkpoint import CHECKPOINTS_NAME
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, MachineConfig, OutputConfig
from maskdm_fast.train.runs import default_cache_dir

SCRATCH, PRETRAIN, FINETUNE = "scratch", "pretrain", "finetune"
_OF_BUDGET = 20  # EMA half-life, longest warm-up and log interval: a twentieth of the images that the budget buys
_CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget.

    Attributes:
        mask: of the first part; None trains on whole images from the start.
        share: s, the part of the budget spent on masked images; 1 never fine-tunes.
    """

    mask: Mask | None = None
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Read ``scratch`` or ``MASK@SHARE``, for example ``block:0.75:4@0.5``; ValueError if it is neither."""
        if text == SCRATCH:
            return cls()
        mask, at, share = text.rpartition("@")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not at or not 0 < value <= 1 or isinstance(parse_mask(mask), NoMask):
            raise ValueError(
                f"arm {text!r} is not understood; want scratch or MASK@SHARE with a mask that hides something and "
                "0 < SHARE <= 1, for example block:0.75:4@0.5"
            )
        return cls(parse_mask(mask), value)

    def __str__(self) -> str:
        return SCRATCH if self.mask is None else f"{format_mask(self.mask)}@{self.share:g}"


@dataclass(frozen=True)
class Method:
    """What all arms take from a preset: the model, the noise process and the settings of each stage."""

    model: UViTConfig
    diffusion: DiffusionConfig
    stages: Mapping[str, DenoisingConfig]

    @classmethod
    def of(cls, preset: str) -> "Method":
        """From the recipe of that name, and NAME-scratch where there is one; ValueError if it is no such recipe."""
        recipe = PRESETS[preset]() if preset in PRESETS else None
        if not isinstance(recipe, Recipe) or len(recipe.stages) != 2:
            made = {name: make() for name, make in PRESETS.items()}
            fit = [name for name, each in made.items() if isinstance(each, Recipe) and len(each.stages) == 2]
            raise ValueError(f"preset {preset!r} is no recipe of two stages; want one of {', '.join(fit)}")
        (_, pretrain), (_, finetune) = recipe.stages
        scratch = PRESETS[f"{preset}-scratch"]().stage if f"{preset}-scratch" in PRESETS else finetune
        return cls(recipe.model, recipe.diffusion, {PRETRAIN: pretrain, FINETUNE: finetune, SCRATCH: scratch})


@dataclass(frozen=True)
class Task:
    """A data set and the method fitted to it.

    Attributes:
        name: of folders and files: data set and size, such as ``emoji32``.
        data: what `open_dataset` takes.
        method: with a model of as many channels as the images have.
        machine: where runs compute.
    """

    name: str
    data: str
    method: Method
    machine: MachineConfig

    @classmethod
    def make(cls, data: str, method: Method, machine: MachineConfig) -> "Task":
        """Open (and pack, the first time) the data set; errors as `open_dataset`."""
        size = method.model.image_size
        store = open_dataset(data, size, cache_dir=machine.cache_dir or default_cache_dir())
        model = replace(method.model, channels=store.channels)
        return cls(f"{Path(data).name}{size}", data, replace(method, model=model), machine)

    def store(self) -> ImageStore:
        """The packed data set."""
        cache_dir = self.machine.cache_dir or default_cache_dir()
        return open_dataset(self.data, self.method.model.image_size, cache_dir=cache_dir)

    def config(self, kind: str, mask: Mask, seed: int) -> RunConfig:
        """A run of stage `kind` with `mask`; what depends on the budget is still the preset's."""
        stage = replace(self.method.stages[kind], mask=mask, max_seconds=None, init_from=None)
        return RunConfig(
            data=self.data,
            seed=seed,
            model=self.method.model,
            diffusion=self.method.diffusion,
            machine=self.machine,
            stage=stage,
        )

    def num_visible(self, mask: Mask) -> int:
        """Patches of an image that `mask` leaves."""
        side = self.method.model.image_size // self.method.model.patch_size
        return mask.num_visible((side, side))


def to_calibrate(tasks: Sequence[Task], arms: Sequence[Arm]) -> Iterator[tuple[Task, RunConfig]]:
    """Every distinct (data set, mask, batch size) that the arms train with, as a run of one step."""
    for task in tasks:
        seen = set()
        for arm in arms:
            kinds = ((SCRATCH, NoMask()),) if arm.mask is None else ((PRETRAIN, arm.mask), (FINETUNE, NoMask()))
            for kind, mask in kinds[: 1 if arm.share == 1 else 2]:
                config = task.config(kind, mask, seed=0)
                key = (format_mask(mask), config.stage.batch_size)
                if key not in seen:
                    seen.add(key)
                    yield task, config


class Prices:
    """Calibrated time of an optimizer step by (data set, mask, batch size).

    Args:
        calibration: the result of `time_to_quality calibrate`.
    """

    def __init__(self, calibration: Mapping[str, Any]) -> None:
        self._ms = {(row["data"], row["mask"], row["batch_size"]): row["ms"] for row in calibration["rows"]}

    def seconds(self, task: Task, config: RunConfig) -> float:
        """tau; ValueError where it was not measured."""
        key = (task.name, format_mask(config.stage.mask), config.stage.batch_size)
        if key not in self._ms:
            raise ValueError(
                f"no calibrated step time of data {key[0]}, mask {key[1]}, batch {key[2]}: run calibrate with the same "
                "--data, --arms and --preset, and another --out where this one already holds runs"
            )
        return self._ms[key] * 1e-3


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: for people.
        folder: where it is.
        arms: those that it is a part of.
        kind: scratch, pretrain or finetune.
        seed: number of the repetition, as given by --seeds.
        config: its configuration, whose `num_images` `until` sets.
        step_seconds: tau of this run.
        budget: B.
        start: fraction of the budget that was spent before it began.
        stops: fractions at which it stops, ascending.
        scored: those of them at which it is scored.
    """

    name: str
    folder: Path
    arms: tuple[Arm, ...]
    kind: str
    seed: int
    config: RunConfig
    step_seconds: float
    budget: float
    start: float
    stops: tuple[float, ...]
    scored: tuple[float, ...]

    def steps(self, fraction: float) -> int:
        """Optimizer steps that the time from `start` to `fraction` buys: ``round((f - start) B / tau)``."""
        return round((fraction - self.start) * self.budget / self.step_seconds)

    def until(self, fraction: float) -> RunConfig:
        """The configuration that ends the run at `fraction` of the budget."""
        num_images = self.steps(fraction) * self.config.stage.batch_size
        return replace(self.config, stage=replace(self.config.stage, num_images=num_images))


@dataclass(frozen=True)
class Chain:
    """The runs of one (data set, seed, mask), in one process one after the other.

    Training is deterministic, so arms that differ in the share alone have their masked part in common: it is trained
    once, and every fine-tuning branches off it.

    Attributes:
        task: of all its runs.
        trunk: from random weights.
        branches: fine-tuning runs by the fraction at which they leave the trunk.
    """

    task: Task
    trunk: Run
    branches: Mapping[float, Run]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The trunk, then its branches."""
        return (self.trunk, *self.branches.values())


@dataclass(frozen=True)
class Budget:
    """How much every arm gets.

    Args:
        seconds: B, at the calibrated step times.
        fractions: when scores are taken, ascending in (0, 1]; the last must be 1.

    Raises:
        ValueError: if a value is out of range.
    """

    seconds: float
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"the budget is {self.seconds} seconds, want more than 0")
        ascending = sorted(set(self.fractions))
        if list(self.fractions) != ascending or not ascending or ascending[0] <= 0 or ascending[-1] != 1:
            raise ValueError(f"the fractions are {self.fractions}, want ascending numbers above 0, the last 1")


def make_chains(
    tasks: Sequence[Task], arms: Sequence[Arm], seeds: Sequence[int], budget: Budget, prices: Prices, out: Path
) -> list[Chain]:
    """All runs, those of the first seed first, so that a part of them can be reported.

    Args:
        tasks: the data sets.
        arms: how to spend the budget.
        seeds: numbers of the repetitions; repetition k draws with the seeds 2 k, and 2 k + 1 where it fine-tunes.
        budget: of each arm.
        prices: calibrated step times.
        out: folder of everything.

    Raises:
        ValueError: a budget buys no step of a stage, a mask does not fit the model, or a step time is unknown.
    """
    groups: dict[Mask | None, list[Arm]] = {}
    for arm in sorted(set(arms), key=lambda arm: arm.share, reverse=True):
        groups.setdefault(arm.mask, []).append(arm)
    return [
        _chain(task, group, seed, budget, prices, out) for seed in seeds for task in tasks for group in groups.values()
    ]


def _chain(task: Task, arms: Sequence[Arm], seed: int, budget: Budget, prices: Prices, out: Path) -> Chain:
    """The runs of `arms`, which differ in their share alone."""

    def run(kind: str, where: str, arms: Sequence[Arm], mask: Mask, start: float = 0.0, end: float = 1.0) -> Run:
        config = task.config(kind, mask, seed=2 * seed + (kind == FINETUNE))
        tau = prices.seconds(task, config)
        scored = tuple(f for f in budget.fractions if start < f <= end)
        stops = tuple(sorted({*scored, *(arm.share for arm in arms if kind == PRETRAIN)}))
        config = _scaled(config, budget.seconds, tau)
        name = f"{task.name}/seed-{seed}/{where}"
        made = Run(name, out / name, tuple(arms), kind, seed, config, tau, budget.seconds, start, stops, scored)
        counts = [0, *map(made.steps, stops)]
        if any(after <= before for before, after in itertools.pairwise(counts)):
            raise ValueError(
                f"{budget.seconds:g} s are too little for {name}: a step takes {tau:.3g} s, and it would stop after "
                f"{counts[1:]} steps; give a larger --budget"
            )
        made.until(stops[-1]).validate()
        return made

    mask = arms[0].mask
    if mask is None:
        return Chain(task, run(SCRATCH, SCRATCH, arms, NoMask()), {})
    where = format_mask(mask).replace(":", "-")
    trunk = run(PRETRAIN, f"{where}/{PRETRAIN}", arms, mask, end=max(arm.share for arm in arms))
    branches = {}
    for arm in arms:
        if arm.share < 1:
            branch = run(FINETUNE, f"{where}/{FINETUNE}-{arm.share:g}", [arm], NoMask(), start=arm.share)
            # By its step, so that a branch can start from no other weights.
            begin = f"{PRETRAIN}/{CHECKPOINTS_NAME}/step-{trunk.steps(arm.share):08d}"
            stage = replace(branch.config.stage, init_from=begin, init_weights="ema")
            branches[arm.share] = replace(branch, config=replace(branch.config, stage=stage))
    return Chain(task, trunk, branches)


def _scaled(config: RunConfig, seconds: float, tau: float) -> RunConfig:
    """Half-life, warm-up and intervals in proportion to the images that `seconds` buy at `tau` a step."""
    stage = config.stage
    images = seconds / tau * stage.batch_size
    part = max(1, round(images / _OF_BUDGET))
    checkpoint_images = max(1, round(images * min(1.0, _CHECKPOINT_SECONDS / seconds)))
    return replace(
        config,
        stage=replace(stage, warmup_images=min(stage.warmup_images, part), ema_half_life_images=part, num_images=None),
        output=OutputConfig(log_images=part, checkpoint_images=checkpoint_images, keep_checkpoints=1),
    )
