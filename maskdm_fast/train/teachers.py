"""The teacher of a distillation: found, taken over into the run folder, and what the student takes from it."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from maskdm_fast.train import checkpoint as checkpoints
from maskdm_fast.train.checkpoint import CheckpointError
from maskdm_fast.train.config import Recipe, RunConfig
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.weights import Weights, load_trained, load_weights, save_weights
from maskdm_fast.train.world import World

TEACHER_NAME = "teacher.safetensors"
"""In the run folder: the weights as they were when the run began, whatever becomes of the run that they came from."""
CHECK_NAME = "teacher.json"
"""Size and SHA-256 of that file, written when it is complete."""


def find_teacher(config: RunConfig, folder: Path, world: World) -> Weights | None:
    """The teacher of a run: the copy in its folder if it goes on, else what the configuration names; None if the run
    distils nothing.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: what it has learnt cannot be distilled by this stage.
        CheckpointError: it is damaged.
    """
    stage = config.stage
    if not isinstance(stage, DistillationConfig):
        return None

    def read() -> Weights:
        if _goes_on(folder):
            _check_copy(folder, stage.teacher)
            return load_weights(folder / TEACHER_NAME, stage.teacher_weights)
        option = f"--teacher {stage.teacher}"
        return load_trained(stage.teacher, folder, stage.teacher_weights, config, option)

    teacher = world.on_each_machine(read)
    if world.is_main:
        teacher.tell_assumed()
    check_kind(config, teacher)
    return teacher


def check_kind(config: RunConfig, teacher: Weights) -> None:
    """Raise ValueError unless the stage of `config` can distil what the stage of its teacher has made."""
    try:
        config.stage.check_teacher(teacher.config.stage)
    except ValueError as error:
        raise ValueError(f"the teacher {teacher.checkpoint.path}: {error}") from None


def keep_teacher(teacher: Weights, folder: Path) -> None:
    """Write the copy of the teacher, unless it is that of a run that goes on; the main process does."""
    if not _goes_on(folder):
        save_weights(teacher, folder / TEACHER_NAME)
        checkpoints.write_json_atomic(folder / CHECK_NAME, checkpoints.fingerprint(folder / TEACHER_NAME))


def _goes_on(folder: Path) -> bool:
    """Whether the folder has a copy of a teacher that a run was taught by, up to a checkpoint at least."""
    return (folder / CHECK_NAME).exists() and checkpoints.exist(folder)


def _check_copy(folder: Path, name: str) -> None:
    kept, check = folder / TEACHER_NAME, folder / CHECK_NAME
    try:
        good = checkpoints.fingerprint(kept) == json.loads(check.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"{kept}, the copy of the teacher, is not what was written. Restore it; or remove {check} to go on with "
            f"{name} as it is now"
        )


def fit_to_teacher(config: RunConfig, teacher: Weights, world: World) -> RunConfig:
    """`config` with the network, the schedule and the kind of prediction of its teacher; says so where that changes
    something."""
    prediction = config.stage.student_prediction(teacher.config.diffusion.prediction)
    fitted = dataclasses.replace(
        config,
        model=teacher.config.model,
        class_conditional=config.class_conditional or teacher.config.model.num_classes > 0,
        diffusion=dataclasses.replace(
            config.diffusion, schedule=teacher.config.diffusion.schedule, prediction=prediction
        ),
    )
    changed = [
        f"{part}.{field.name} {old} -> {new}"
        for part in ("model", "diffusion")
        for field in dataclasses.fields(getattr(config, part))
        if (old := getattr(getattr(config, part), field.name)) != (new := getattr(getattr(fitted, part), field.name))
    ]
    if changed and world.is_main:
        print(f"as the teacher {teacher.checkpoint.path}: {', '.join(changed)}", file=sys.stderr, flush=True)
    fitted.validate()
    return fitted


def taught(config: RunConfig | Recipe, folder: Path) -> RunConfig | Recipe:
    """`config` with what `fit_to_teacher` takes from the teacher of its first stage, for an estimate; says so where
    there is no teacher yet.

    Raises:
        As `find_teacher`, but for a teacher that is not there.
    """
    first, run = config.runs()[0] if isinstance(config, Recipe) else ("", config)
    world = World(torch.device("cpu"))
    try:
        teacher = find_teacher(run, folder / first, world)
    except FileNotFoundError as error:
        print(f"counted is the network of the preset: {error}", file=sys.stderr, flush=True)
        return config
    if teacher is None:
        return config
    run = fit_to_teacher(run, teacher, world)
    if not isinstance(config, Recipe):
        return run
    taken = {name: getattr(run, name) for name in ("model", "class_conditional", "diffusion")}
    return dataclasses.replace(config, **taken)
