"""Two networks trained in turn, each under an engine of its own: one process or several, the same curves and weights,
and a run may go on under another engine."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.train import RunConfig, checkpoint, load_weights, read_metrics, train
from maskdm_fast.train.config import PolicyDistillationConfig, RegressionConfig
from maskdm_fast.train.pieces import group_of
from tests.train.distributed.conftest import ODD, on
from tests.train.distributed.curves import far_weights

CLOCK = {"kind", "seconds", "images_per_s", "tokens_per_s", "model_tflops", "peak_mib"}
STEPS = 6
_MADE = pytest.StashKey[dict[str, Path]]()


@pytest.fixture
def make_run(make_student) -> Callable[..., RunConfig]:
    """6 steps of 8 images, logged by twos, with a checkpoint every 3."""

    def make(engine: str = "plain", **changes) -> RunConfig:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        defaults = {
            "model": ODD,
            "num_images": 8 * STEPS,
            "batch_size": 8,
            "warmup_images": 16,
            "ema_half_life_images": 32,
        }
        output = {
            "ema_half_life_images": 32,
            "log_images": 16,
            "checkpoint_images": 24,
            "keep_checkpoints": 9,
            "preview_images": 3,
        }
        return make_student(**{**defaults, **output, "engine": engine, **changes})

    return make


@pytest.fixture
def taught(make_config, finish, tmp_path_factory, request) -> Callable[[RunConfig], Path]:
    """Folder of the run of a configuration in one process, made once; its teacher lies beside it."""
    made = request.config.stash.setdefault(_MADE, {})

    def get(config: RunConfig) -> Path:
        if "folder" not in made:
            made["folder"] = tmp_path_factory.mktemp("taught")
        teacher, key = made["folder"] / config.stage.teacher, json.dumps(config.to_dict())
        if not teacher.exists():
            learns = {"mask": NoMask(), "num_images": 80, "log_images": 80, "checkpoint_images": 80}
            same = {name: getattr(config, name) for name in ("model", "diffusion", "data", "class_conditional")}
            train(make_config(**learns, **same, label_drop=0.1 if config.class_conditional else 0.0), teacher)
        if key not in made:
            made[key] = made["folder"] / str(len(made))
            finish(config, made[key], 1)
        return made[key]

    return get


def rows(folder: Path) -> list[dict]:
    """The log without what depends on the machine."""
    logs = [record for record in read_metrics(folder) if record["kind"] == "log"]
    return [{k: v for k, v in row.items() if k not in CLOCK and not k.endswith("_ms")} for row in logs]


def far_curves(a: Path, b: Path) -> dict[str, float]:
    """The largest difference of every logged value, as a share of the largest one of its curve: losses that are
    differences may come near zero."""
    first, second = rows(a), rows(b)
    assert [row.keys() for row in first] == [row.keys() for row in second] and len(first) == STEPS // 2
    largest: dict[str, float] = {}
    apart: dict[str, float] = {}
    for row, other in zip(first, second, strict=True):
        for name, value in row.items():
            largest[name] = max(abs(value), largest.get(name, 0.0))
            apart[name] = max(abs(value - other[name]), apart.get(name, 0.0))
    return {name: value and value / largest[name] for name, value in apart.items()}


def assert_equal_but_for_rounding(alone: Path, run: Path) -> None:
    """Curves, averaged and trained weights of the student, those of what is trained beside it, and pictures."""
    apart = far_curves(alone, run)
    assert max(apart.values()) < 1e-5, apart
    for which in ("raw", "ema"):
        assert far_weights(alone, run, which) < 1e-4
    for group in ("fake_model", "value_model", "velocity"):
        wanted, found = (checkpoint.newest(folder).tensors(group) for folder in (alone, run))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    pictures = [Image.open(folder / "samples" / f"step-{STEPS:08d}.png") for folder in (alone, run)]
    assert np.abs(np.subtract(*(np.asarray(picture, int) for picture in pictures))).max() <= 1


DXMI = {"kind": PolicyDistillationConfig, "num_steps": 4, "value_width": 8, "num_policy_updates": 2}
METHODS = {
    "sid": {"num_steps": 2, "trained_steps": "one"},
    "sida": {"method": "sida", "freeze_images": 8, "adversarial_from": 16, "activation_checkpointing": True},
    "dmd2": {"method": "dmd2", "fake_updates": 2, "input_level": 10.0},
    "consistency": {"kind": RegressionConfig, "method": "consistency", "images_per_stage": 16, "num_stages": 3},
    "progressive": {"kind": RegressionConfig, "method": "progressive", "num_steps": 2, "hflip": 0.5},
    "guided": {
        **{"kind": RegressionConfig, "method": "guided", "strengths": (0.5, 3.0)},
        **{"teacher": "with classes", "class_conditional": True},
    },
    "dxmi": {**DXMI, "value": "vit", "value_depth": 1, "value_heads": 2},
    "dxmi, convolutions": {**DXMI, "teacher": "even", "model": replace(ODD, image_size=8, patch_size=4)},
}
ENGINES = {"ddp": 2, "zero1": 2, "zero2": None, "zero3": None}
"""Images of a micro-batch; None: all that a process has."""
CASES = [
    *((method, engine, micro) for method in METHODS for engine, micro in ENGINES.items()),
    ("sid", "zero3", 2),
    ("dmd2", "zero3-offload", 2),
    ("dxmi", "ddp", None),
]


@pytest.mark.parametrize(("method", "engine", "micro"), CASES)
def test_fp32(make_run, class_folder, taught, finish, method, engine, micro):
    changes = METHODS[method] | ({"data": str(class_folder)} if method == "guided" else {})
    config = make_run(engine, micro_batch_size=micro, **changes)
    alone = taught(make_run(**changes))
    run = alone.with_name(f"{alone.name}-{engine}")
    finish(config, run)
    assert_equal_but_for_rounding(alone, run)


@pytest.mark.parametrize(("method", "engine"), [("dmd2", "zero2"), ("sid", "zero3")])
def test_bf16(make_run, taught, finish, method, engine):
    """Engines round at other places, none of them farther from float32 than a few roundings."""
    config = make_run(engine, precision="bf16", **METHODS[method])
    alone = taught(make_run(**METHODS[method]))
    run = alone.with_name(f"{alone.name}-{engine}-bf16")
    finish(config, run)
    apart = far_curves(alone, run)
    assert 1e-5 < apart["loss"] < 0.05 and apart["grad_norm"] < 0.2, apart


PARTS = {
    "sid": (("zero2", 2), ("plain", 1)),
    "dmd2": (("plain", 1), ("zero2", 2)),
    "dxmi": (("zero3", 2), ("zero1", 1)),
}
STOPS = (3, 6)  # in the middle of a mean of the log, and at the end
BESIDE = {"sid": {"fake_model", "fake_optimizer"}, "dxmi": {"value_model", "value_optimizer", "velocity"}}


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a damaged checkpoint
@pytest.mark.parametrize("method", PARTS)
def test_another_engine_and_number_of_processes(make_run, taught, finish, method):
    """Both networks are in the checkpoint, each in the pieces of its engine; only the student has an average."""
    make_run("zero1")  # or skip
    config = make_run(**METHODS[method])
    alone = taught(config)
    run = alone.with_name(f"{alone.name}-parts")
    for (engine, processes), stop in zip(PARTS[method], STOPS, strict=True):
        until = replace(config, stage=replace(config.stage, num_images=8 * stop))
        ended = finish(on(until, engine), run, processes)
        assert [one.result for one in ended] == [{"reason": "num_images", "step": stop}] * processes
        groups = {group_of(path.name) for path in checkpoint.newest(run).path.glob("*.safetensors")}
        assert groups == {"model", "ema", "optimizer"} | BESIDE["dxmi" if method == "dxmi" else "sid"]
    assert_equal_but_for_rounding(alone, run)


def test_the_same_engine_goes_on_bit_for_bit(make_run, taught, finish):
    config = make_run("zero3", **METHODS["sid"])
    folder = taught(make_run(**METHODS["sid"])).with_name("again")
    finish(config, folder)

    def state() -> tuple[dict[str, bytes], list[dict]]:
        files = checkpoint.newest(folder).path.glob("*.safetensors")
        return {path.name: path.read_bytes() for path in files}, rows(folder)

    whole = state()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert checkpoint.newest(folder).step == 3  # in the middle of a mean
    finish(config, folder)
    assert (state() == whole) is True  # without pytest's comparison of files


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_student_whose_turn_has_not_come(make_run, taught, finish, engine):
    """Its average is what it began with, though DeepSpeed has never stepped its optimizer."""
    config = make_run(**{**METHODS["sida"], "freeze_images": 10**6, "num_images": 24})
    alone = taught(config)
    run = alone.with_name(f"{alone.name}-{engine}")
    finish(on(config, engine), run)
    pictures = [(folder / "samples" / "step-00000003.png").read_bytes() for folder in (alone, run)]
    assert (pictures[0] == pictures[1]) is True
    teacher = load_weights(alone.with_name("teacher")).tensors
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in load_weights(run).tensors.items())


def test_images_that_are_none(make_run, taught, launch, finish):
    """One process may be left without any and learn nothing; a run ends when none has."""
    config = make_run(**METHODS["sid"])
    broken = {"no_images_of": [0, 1, 2, 3, 6]}
    alone = taught(config).with_name("broken")
    finish(config, alone, 1, faults={0: broken})
    assert {row["finite_share"] for row in rows(alone)} == {0.375}
    for engine in ("ddp", "zero2"):
        finish(on(config, engine), alone.with_name(f"broken-{engine}"), faults={0: broken, 1: broken})
        assert_equal_but_for_rounding(alone, alone.with_name(f"broken-{engine}"))
    nothing = {"no_images_of": list(range(8))}
    for one in launch(on(config, "ddp"), alone.with_name("nothing"), faults={0: nothing, 1: nothing}):
        assert one.error.startswith("TrainingDivergedError: generator_loss became NaN or infinite at step 1"), one.log


def test_a_teacher_that_is_not_there(make_run, launch, tmp_path):
    ended = launch(make_run("ddp", teacher="nobody"), tmp_path / "run")
    assert ended[0].error.startswith("FileNotFoundError: nothing to start from"), ended[0].log
    assert "--teacher nobody" in ended[0].error and ended[1].code == 1
