"""What `benchmarks.time_to_quality` does with a plan: measure step times, train, score."""

import contextlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.ttq_plan import Arm, Chain, Run, Task, to_calibrate
from maskdm_fast.data import ImageStore
from maskdm_fast.diffusion.mask_text import format_mask
from maskdm_fast.eval import (
    FeatureNetwork,
    cached_features,
    compute_features,
    frechet_distance,
    kernel_distance,
    load_features,
    subset_indices,
)
from maskdm_fast.train import RunConfig, load_weights, train
from maskdm_fast.train.checkpoint import write_json_atomic
from maskdm_fast.train.feed import Feed
from maskdm_fast.train.generation import generate
from maskdm_fast.train.runs import default_cache_dir
from maskdm_fast.train.stages import build_stage
from maskdm_fast.train.world import make_world

SCORES_NAME, FLOOR_NAME = "scores.json", "floor.json"
_SUBSET_SEED = 0  # of the real images that stand for a data set, and of the floor's split


def step_function(config: RunConfig, store: ImageStore) -> Callable[[], None]:
    """A function that fetches the next batch and trains one step on it, as a run of `config` does."""
    world = make_world(config.machine.device)
    stage = build_stage(config, world)
    feed, numbers = Feed(config, store, world), itertools.count()

    def step() -> None:
        number = next(numbers)
        # Reading the loss waits for the device.
        float(stage.step(feed.batches(number), number)["loss"])

    return step


def _step_ms(tasks: Sequence[Task], arms: Sequence[Arm], threads: int, repeats: int) -> list[float]:
    """Median step time of every row of a calibration, in this process."""
    torch.set_num_threads(threads)
    steps = {
        number: step_function(config, task.store()) for number, (task, config) in enumerate(to_calibrate(tasks, arms))
    }
    return list(harness.interleave(steps, repeats).values())


def calibrate(
    tasks: Sequence[Task], arms: Sequence[Arm], *, threads: int, jobs: int, repeats: int
) -> list[dict[str, Any]]:
    """Time of one optimizer step of every (data set, mask, batch size) that the arms train with.

    The steps are those of the stage itself, with data and optimizer, and take turns, so that what slows the machine
    down slows all of them.

    Args:
        tasks: the data sets.
        arms: for their masks.
        threads: of each process.
        jobs: processes that measure the same side by side; their medians are averaged.
        repeats: samples of each step.

    Returns:
        Rows ``{data, mask, batch_size, num_visible, ms, images_per_s}``.
    """
    if jobs == 1:
        measured = [_step_ms(tasks, arms, threads, repeats)]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(_step_ms, tasks, arms, threads, repeats) for _ in range(jobs)]
            measured = [future.result() for future in waiting]
    rows = []
    for (task, config), *times in zip(to_calibrate(tasks, arms), *measured, strict=True):
        milliseconds = sum(times) / len(times)
        rows.append(
            {
                "data": task.name,
                "mask": format_mask(config.stage.mask),
                "batch_size": config.stage.batch_size,
                "num_visible": task.num_visible(config.stage.mask),
                "ms": round(milliseconds, 4),
                "images_per_s": round(config.stage.batch_size / milliseconds * 1e3, 2),
            }
        )
    return rows


@dataclass(frozen=True)
class Scoring:
    """How weights are scored.

    Attributes:
        num_samples: images drawn from the EMA weights, with the run's seed.
        num_steps: evaluations of the network for each.
        sampler: as in `maskdm_fast.diffusion.sample`.
        num_reference: real images at most, drawn at random from the data set.
        features: feature network, as in `load_features`.
    """

    num_samples: int = 500
    num_steps: int = 25
    sampler: str = "ddim"
    num_reference: int = 2000
    features: str = "lite0"


@dataclass(frozen=True)
class Scorer:
    """Scores runs of one data set."""

    task: Task
    scoring: Scoring

    @cached_property
    def network(self) -> FeatureNetwork:
        """The feature network, loaded when first used."""
        return load_features(self.scoring.features).to(make_world(self.task.machine.device).device)

    @cached_property
    def reference(self) -> Tensor:
        """Features of the real images, kept in the cache folder."""
        store = self.task.store()
        chosen = subset_indices(len(store), min(self.scoring.num_reference, len(store)), seed=_SUBSET_SEED).numpy()
        key = f"{store.header.checksum}|{len(chosen)}|{_SUBSET_SEED}"
        cache_dir = self.task.machine.cache_dir or default_cache_dir()
        return cached_features(store.images[chosen], self.network, key=key, cache_dir=cache_dir)

    def settings(self) -> dict[str, Any]:
        """What two scores must share to be compared; JSON values."""
        return {
            **asdict(self.scoring),
            "features": self.network.fingerprint,
            "num_reference": len(self.reference),
            "fd_name": self.network.name,
            "kid_name": self.network.kernel_name,
            "weights": "ema",
        }

    def floor(self) -> dict[str, Any]:
        """What real images score in place of generated ones: ``{fd, kid, num_images, num_reference}``."""
        real = self.reference
        taken = min(self.scoring.num_samples, len(real) // 2)
        order = subset_indices(len(real), len(real), seed=_SUBSET_SEED)
        held_out, rest = real[order[:taken]], real[order[taken:]]
        return {**_distances(held_out, rest), "num_images": taken, "num_reference": len(rest)}

    def score(self, folder: Path, seed: int) -> dict[str, float]:
        """``{fd, kid}`` of images drawn from the newest checkpoint of a run, EMA weights."""
        weights = load_weights(folder)
        samples = generate(
            weights.config,
            weights.tensors,
            self.scoring.num_samples,
            num_steps=self.scoring.num_steps,
            sampler=self.scoring.sampler,
            seed=seed,
            device=self.network.device,
        )
        return _distances(compute_features(samples, self.network), self.reference)


def _distances(features: Tensor, reference: Tensor) -> dict[str, float]:
    return {"fd": frechet_distance(features, reference), "kid": kernel_distance(features, reference)}


def prepare(task: Task, scoring: Scoring, out: Path) -> None:
    """Pack the data, compute the reference's features, and write the floor's scores: once, before workers share them.

    Raises:
        ValueError: `out` was begun with another scoring.
    """
    scorer = Scorer(task, scoring)
    path = out / task.name / FLOOR_NAME
    if path.exists():
        _check_settings(path, json.loads(path.read_text("utf-8"))["settings"], scorer.settings())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"attribution": task.store().header.attribution, "num_images": len(task.store())}
    write_json_atomic(path, {"settings": scorer.settings(), "data": about, "floor": scorer.floor()})


def _check_settings(path: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    if begun != now:
        raise ValueError(f"{path} holds scores of {begun}, now it is {now}; choose another folder with --out")


def run_chain(chain: Chain, scoring: Scoring) -> bool:
    """Train and score all that is not yet done; False if a signal ended the training, whose state was then saved.

    Every branch is trained while the trunk stands where it leaves, so that one checkpoint per run is enough.

    Raises:
        RuntimeError: a run has gone past a point at which it was not scored.
    """
    scorer = Scorer(chain.task, scoring)
    for fraction in chain.trunk.stops:
        if not _advance(chain.trunk, fraction, scorer):
            return False
        branch = chain.branches.get(fraction)
        if branch is not None and not all(_advance(branch, later, scorer) for later in branch.stops):
            return False
    return True


def _advance(run: Run, fraction: float, scorer: Scorer) -> bool:
    """Train `run` to `fraction` of the budget and score it there, unless that was done."""
    points = read_points(run.folder)
    if any(point["fraction"] == fraction for point in points):
        return True
    config = run.until(fraction)
    result = train(config, run.folder, title=f"{run.name} to {fraction:.0%}")
    if not result.finished:
        return False
    if fraction not in run.scored:
        return True
    if result.images != config.stage.num_images:
        raise RuntimeError(
            f"{run.folder} stands at {result.images:,} images, beyond the {config.stage.num_images:,} at which its "
            f"score is missing; remove {run.folder.parent} to train it again"
        )
    begin = time.monotonic()
    scores = scorer.score(run.folder, 2 * run.seed)
    point = {
        "fraction": fraction,
        "images": result.images,
        "calibrated_seconds": (fraction - run.start) * run.budget,
        "train_seconds": round(result.seconds, 3),
        **scores,
    }
    _write_points(run, [*points, point])
    shown = f"{scorer.network.name} {scores['fd']:.1f}, {scorer.network.kernel_name} {scores['kid']:.4f}"
    print(f"{run.name} at {fraction:.0%}: {shown}; scored in {time.monotonic() - begin:.0f} s", flush=True)
    return True


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The scores of a run so far."""
    path = folder / SCORES_NAME
    return json.loads(path.read_text("utf-8"))["points"] if path.exists() else []


def _write_points(run: Run, points: list[dict[str, Any]]) -> None:
    stage = run.config.stage
    about = {
        "arms": [str(arm) for arm in run.arms],
        "kind": run.kind,
        "seed": run.seed,
        "mask": format_mask(stage.mask),
        "start": run.start,
        "budget": run.budget,
        "step_ms": run.step_seconds * 1e3,
        **{name: getattr(stage, name) for name in ("batch_size", "lr", "warmup_images", "ema_half_life_images")},
    }
    write_json_atomic(run.folder / SCORES_NAME, {"run": about, "points": points})


def _chain_process(chain: Chain, scoring: Scoring, threads: int) -> None:
    torch.set_num_threads(threads)
    raise SystemExit(0 if run_chain(chain, scoring) else 1)


def run_chains(chains: Sequence[Chain], scoring: Scoring, *, jobs: int, threads: int, stop: Callable[[], bool]) -> int:
    """Run chains, `jobs` at a time, each in a process of its own where that is more than one.

    Args:
        chains: in the order in which they begin.
        scoring: of all.
        jobs: how many at once.
        threads: of each.
        stop: asked every now and then; when it is true, running chains are asked to save, and no more begin.

    Returns:
        How many chains are not finished. What went wrong in a process stands in its traceback on stderr.
    """
    if jobs == 1:
        torch.set_num_threads(threads)
        for number, chain in enumerate(chains):
            if stop() or not run_chain(chain, scoring):
                return len(chains) - number
        return 0
    context = multiprocessing.get_context("spawn")
    waiting, running, unfinished = list(chains), [], 0
    with _terminated(running):
        while waiting or running:
            while waiting and len(running) < jobs and not stop():
                process = context.Process(target=_chain_process, args=(waiting.pop(0), scoring, threads))
                process.start()
                running.append(process)
            if stop():
                unfinished, waiting = unfinished + len(waiting), []
                for process in running:
                    process.terminate()
            for process in list(running):
                process.join(timeout=0.5 / jobs)
                if process.exitcode is not None:
                    running.remove(process)
                    unfinished += process.exitcode != 0
    return unfinished


@contextlib.contextmanager
def _terminated(running: list[multiprocessing.Process]) -> Iterator[None]:
    """Whatever happens inside, no process of `running` goes on alone."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
