"""Start and resume runs: everything that happens around the training loop."""

import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maskdm_fast.data import ImageStore, StoreHeader, no_images, open_dataset
from maskdm_fast.ops import backend
from maskdm_fast.train import checkpoint as checkpoints
from maskdm_fast.train.classes import check_same_classes, match_classes
from maskdm_fast.train.config import NO_DATA, Recipe, RunConfig
from maskdm_fast.train.config_json import differences
from maskdm_fast.train.engine_choice import check_engine, choose_engine
from maskdm_fast.train.extras import require
from maskdm_fast.train.feed import Feed
from maskdm_fast.train.memory import memory_per_rank
from maskdm_fast.train.progress import step_bar
from maskdm_fast.train.scores import Scorer
from maskdm_fast.train.signals import StopSignals
from maskdm_fast.train.stages import build_stage
from maskdm_fast.train.teachers import find_teacher, fit_to_teacher, keep_teacher
from maskdm_fast.train.trackers import require_trackers
from maskdm_fast.train.trainer import Trainer, TrainResult
from maskdm_fast.train.weights import Weights, is_stage_name, load_trained, stage_folders
from maskdm_fast.train.world import World, make_world

_SHOWN = 40


def train(
    config: RunConfig, folder: Path | str, *, title: str | None = None, signals: StopSignals | None = None
) -> TrainResult:
    """Start or resume a run.

    Args:
        config: what to train.
        folder: the run folder; made if missing. If it holds a run, that run goes on.
        title: shown beside the progress; by default the folder's name.
        signals: of a caller who trains several runs in a row and already listens; by default the run listens itself.

    Raises:
        ValueError: the configuration cannot work, or differs from the one the folder was begun with.
        FileNotFoundError: the data set, `init_from` or the teacher is not there.
        TrainingDivergedError: a loss or gradient was not finite.
        CheckpointError: a checkpoint cannot be written, or those that are there are all damaged.
        PeerError, LostPeerError: another process failed, or ended.
    """
    config.validate()
    # What is missing must show now, not at the first checkpoint.
    for module in ("safetensors.torch", *(["PIL"] if config.output.preview_images else [])):
        require(module)
    require_trackers(config.output.trackers)
    folder = Path(folder)
    world = make_world(config.machine.device)
    teacher = find_teacher(config, folder, world)
    if teacher is not None:
        config = fit_to_teacher(config, teacher, world)
    store = world.on_each_machine(lambda: open_store(config, teacher))
    _check_same("the data set", lambda: _told_by(store.header), world)
    if teacher is not None:
        _check_same("the teacher", lambda: {"sha256": teacher.sha256}, world)
        check_same_classes(teacher, store.class_names, config.data)
    config = fit_to_latents(fit_to_classes(config, store.class_names), store.header)
    settled = _settle_engine(config, world)
    score = None
    if config.output.score_images:
        cache_dir = config.machine.cache_dir or default_cache_dir()
        score = Scorer(config, store, cache_dir=cache_dir, world=world)
    with ExitStack() as stack:
        world.on_main(lambda: _take(folder, config, teacher, stack))
        _check_shared(folder, world)
        signals = signals or stack.enter_context(StopSignals())
        checkpoint = world.on_main(lambda: checkpoints.resume(folder))
        weights = None
        if checkpoint is None and config.stage.init_from is not None:
            weights = _initial_weights(config, folder, store.class_names, world)
        stage = build_stage(settled, world, weights, teacher)
        memory = memory_per_rank(settled, settled.machine.engine, world.world_size)
        taken = backend.allocated_memory(world.device)
        feed = Feed(config, store, world, still_needed=memory.still_needed(taken))
        stack.callback(feed.close)
        trainer = Trainer(config, folder, stage, store, feed, world, score, engine=settled.machine.engine)
        if checkpoint is not None:
            trainer.load(checkpoint)
        result = trainer.run(signals, title=title or folder.name)
        stage.close()  # not after an error, when a device may never answer
        return result


def _settle_engine(config: RunConfig, world: World) -> RunConfig:
    """`config` with the engine that it names or, if that is auto, the one that fits; says which where it matters."""
    processes = 1 + max(world.everywhere(lambda: world.local_rank))
    host = backend.device_memory(torch.device("cpu")) / processes
    memory = (host, None) if world.device.type == "cpu" else (backend.device_memory(world.device), host)
    engine, why = world.on_main(lambda: choose_engine(config, world.world_size, *memory))
    if world.is_main and engine != "plain":
        print(f"engine {engine}, {world.world_size} processes: {why}", file=sys.stderr, flush=True)
    return replace(config, machine=replace(config.machine, engine=engine))


def _take(folder: Path, config: RunConfig, teacher: Weights | None, stack: ExitStack) -> None:
    """Make the run folder, hold it until `stack` closes, and write down what it is for and by whom it is taught."""
    _check_one_meaning(folder.absolute())
    make_folder(folder)
    stack.enter_context(checkpoints.locked(folder))
    _claim(folder, config)
    if teacher is not None:
        keep_teacher(teacher, folder)


def _check_one_meaning(folder: Path) -> None:
    """Raise ValueError where a single run and stages of a recipe would share a folder, whose name would mean either."""
    if is_stage_name(folder.name) and checkpoints.exist(folder.parent):
        raise ValueError(f"{folder.parent} holds a run, so no stages of a recipe; choose another folder with --out")
    stages = [stage.name for stage in stage_folders(folder) if checkpoints.exist(stage)]
    if stages:
        raise ValueError(f"{folder} holds stages of a recipe ({', '.join(stages)}); choose another folder with --out")


def _check_shared(folder: Path, world: World) -> None:
    """Raise RuntimeError if a process does not see what the main one has written to the run folder."""
    written = world.on_main(lambda: (folder / checkpoints.CONFIG_NAME).read_bytes())

    def look() -> None:
        path = folder / checkpoints.CONFIG_NAME
        if not path.exists() or path.read_bytes() != written:
            raise RuntimeError(
                f"the run folder {folder.resolve()} is not the one that the main process writes to; choose one with "
                "--out on a file system that all machines share"
            )

    world.everywhere(look)


def train_recipe(recipe: Recipe, folder: Path | str) -> TrainResult:
    """Run a recipe's stages in order, each in its sub-folder of `folder`; finished stages are passed over.

    Returns:
        How the last stage that ran has ended. Arguments and errors as in `train`.
    """
    recipe.validate()
    folder, runs = Path(folder), recipe.runs()
    world = make_world(recipe.machine.device)
    world.on_main(lambda: _check_stages(runs, folder, world))
    with StopSignals() as signals:
        for name, config in runs:
            result = train(config, folder / name, title=f"{folder.name}/{name}", signals=signals)
            if not result.finished:
                break
    return result


def _check_stages(runs: Sequence[tuple[str, RunConfig]], folder: Path, world: World) -> None:
    """Raise, before anything is trained, for a stage that could not run, or that has begun from another than the one
    before it would become."""
    for _, config in runs:
        engine = config.machine.engine
        if engine == "auto":
            engine = "plain" if world.world_size == 1 else "ddp"
        check_engine(config, engine, world.world_size, world.device.type)
    for (name, config), (following, _) in itertools.pairwise(runs):
        begun = checkpoints.newest(folder / name) if checkpoints.exist(folder / following) else None
        if begun is None:
            continue
        stage, seconds = config.stage, begun.state["seconds"]
        all_images = stage.num_images is not None and begun.step * stage.batch_size >= stage.num_images
        if not all_images and (stage.max_seconds is None or seconds < stage.max_seconds):
            raise ValueError(
                f"{name} would go on from step {begun.step}, but {following} has begun from what it was there; remove "
                f"{folder / following} to train it anew, or choose another folder with --out"
            )


def open_store(config: RunConfig, teacher: Weights | None = None) -> ImageStore:
    """The run's data set, packed if it was not; without one its teacher's classes. ValueError if the model does not
    fit."""
    cache_dir = config.machine.cache_dir or default_cache_dir()
    model = config.model
    if config.data == NO_DATA:
        names = teacher.class_names
        latents, bound = teacher.config.latents, teacher.config.latent_bound
        shape = (model.image_size, model.image_size, model.channels)
        return no_images(shape, names, latents=latents, bound=1.0 if bound is None else bound)
    with step_bar("preparing the data set") as progress:
        store = open_dataset(
            config.data,
            model.image_size,
            channels=model.channels,
            cache_dir=cache_dir,
            skip_bad=config.skip_bad,
            latents=config.latents,
            decoding=config.decoding,
            progress=progress,
        )
    classes = len(store.class_names)
    if config.model.num_classes not in (0, classes):
        raise ValueError(
            f"num_classes is {config.model.num_classes}, but the data set has {classes} classes; want 0 or {classes}"
        )
    return store


def _check_same(what: str, mine: Callable[[], dict[str, Any]], world: World) -> None:
    """Raise ValueError in every process if one of them has read something else than the main one, by what `mine` says
    of it: machines may have copies of their own."""
    if world.world_size == 1:
        return
    main, *others = world.everywhere(mine)
    for rank, other in enumerate(others, start=1):
        changed = [
            f"{name} {str(other[name])[:_SHOWN]} instead of {str(value)[:_SHOWN]}"
            for name, value in main.items()
            if other[name] != value
        ]
        if changed:
            raise ValueError(
                f"{what} of rank {rank} differs from that of rank 0: {', '.join(changed)}. Give all machines the same"
            )


def _told_by(header: StoreHeader) -> dict[str, Any]:
    return {name: getattr(header, name) for name in ("shape", "checksum", "class_names", "latents", "bound")}


def fit_to_classes(config: RunConfig, class_names: Sequence[str]) -> RunConfig:
    """`config` with the model's ``num_classes`` taken from the data set, if the run is class-conditional.

    Raises:
        ValueError: classes are to be told apart or balanced, but the data set has none.
    """
    wishes = {"class_conditional": config.class_conditional, "class_balance": config.stage.class_balance}
    asked = [f"{name} is {value}" for name, value in wishes.items() if value]
    if asked and not class_names:
        raise ValueError(f"{asked[0]}, but the data set {config.data!r} has no classes; sub-folders are classes")
    if not config.class_conditional:
        return config
    return replace(config, model=replace(config.model, num_classes=len(class_names)))


def fit_to_latents(config: RunConfig, header: StoreHeader) -> RunConfig:
    """`config` with scale, shift and bound of the latents that the data set holds, if it does.

    Raises:
        ValueError: something is wished for that cannot be had with latents, or with anything else.
    """
    if config.latents not in (None, header.latents):
        raise ValueError(f"the data set {config.data!r} holds {header.latents or 'images'}, not {config.latents}")
    if header.latents is None:
        if config.latent_bound is not None:
            raise ValueError(
                f"latent_bound is {config.latent_bound}, but the data set {config.data!r} holds images, whose bound "
                "is 1; leave it out"
            )
        return config
    scale, shift = header.latents
    bound = header.bound if config.latent_bound is None else config.latent_bound
    config = replace(config, latent_scale=scale, latent_shift=shift, latent_bound=bound)
    config.validate()
    return config


def default_cache_dir() -> Path:
    """Where packed data sets are kept: ``$XDG_CACHE_HOME/maskdm_fast``, or ``~/.cache/maskdm_fast``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskdm_fast"


def _initial_weights(config: RunConfig, folder: Path, class_names: Sequence[str], world: World) -> Weights:
    """The weights that ``init_from`` names, with the classes of the data set."""
    stage = config.stage
    weights = load_trained(stage.init_from, folder, stage.init_weights, config, f"--init-from {stage.init_from}")
    _check_same(f"--init-from {stage.init_from}", lambda: {"sha256": weights.sha256}, world)
    if world.is_main:
        weights.tell_assumed()
    for name in ("schedule", "prediction"):
        there, here = (getattr(each.diffusion, name) for each in (weights.config, config))
        if there == here or (name == "schedule" and _sees_the_noise(config, weights.config)):
            continue
        if world.is_main:
            warnings.warn(
                f"the weights of {weights.checkpoint.path} were trained with {name} {there}, this run has {here}: what "
                "the network has learnt to predict is not what it is asked for now",
                RuntimeWarning,
                stacklevel=2,
            )
    return match_classes(weights, class_names, config.seed, world) if config.model.num_classes else weights


def _sees_the_noise(config: RunConfig, trained: RunConfig) -> bool:
    """Whether a network that goes on in `config` sees, time by time, the noise that it was `trained` with, though the
    schedules are two: larger patches average it."""
    here, there = (each.diffusion.noise_schedule(each.model) for each in (config, trained))
    if here.num_timesteps is None or here.num_timesteps != there.num_timesteps:
        return False
    t = torch.arange(here.num_timesteps)
    averaged = 2.0 * math.log(config.model.patch_size / trained.model.patch_size)
    return torch.allclose(here.log_snr(t) + averaged, there.log_snr(t))


def make_folder(folder: Path) -> None:
    """Make a run folder and check that it can be written; RuntimeError that says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RuntimeError(f"cannot write to the run folder {folder}: {error}; choose another with --out") from error


def _claim(folder: Path, config: RunConfig) -> None:
    """Write config.json, after checking that the folder was not begun with another configuration.

    Until its first checkpoint there is nothing of a run to go on with, so it may be begun anew, and otherwise.
    """
    path, new = folder / checkpoints.CONFIG_NAME, config.to_dict()
    if checkpoints.exist(folder) and path.exists():
        try:
            old: dict[str, Any] = RunConfig.from_dict(json.loads(path.read_text("utf-8"))).to_dict()
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no configuration of a run ({error}); restore it, or choose another folder with --out"
            ) from error
        changed = differences(old, new)
        if changed:
            lines = "".join(f"\n  {line}" for line in changed)
            raise ValueError(
                f"{folder} was begun with another configuration:{lines}\n"
                "Give the options it was begun with, or choose another folder with --out. "
                "(Stopping rules, machine and output options may change.)"
            )
    checkpoints.write_json_atomic(path, new)
