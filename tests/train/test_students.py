"""Runs that distil: they end where they would have without a stop, and what they leave can be used as any run."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.models import UViT
from maskdm_fast.train import (
    Recipe,
    TrainingDivergedError,
    checkpoint,
    export,
    load_weights,
    read_metrics,
    scores,
    train,
    train_recipe,
)
from maskdm_fast.train.config import (
    DiffusionConfig,
    PolicyDistillationConfig,
    RegressionConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.generation import generate
from maskdm_fast.train.stages import STAGES
from tests.train.test_scores import MeanFeatures

CPU = torch.device("cpu")
CLOCK = {"seconds", "images_per_s", "tokens_per_s", "model_tflops", "peak_mib"}


def ends_as(a: Path, b: Path) -> None:
    """Two runs have the same checkpoint, bit for bit, and the same curve."""
    first, second = checkpoint.newest(a), checkpoint.newest(b)
    names, others = ({path.name for path in each.path.glob("*.safetensors")} for each in (first, second))
    assert names == others and len(names) >= 3
    for name in names:
        assert ((first.path / name).read_bytes() == (second.path / name).read_bytes()) is True, name
    curves = [
        [{name: value for name, value in row.items() if name not in CLOCK and not name.endswith("_ms")} for row in rows]
        for rows in ([row for row in read_metrics(folder) if row["kind"] == "log"] for folder in (a, b))
    ]
    assert curves[0] == curves[1] and len(curves[0]) > 1


@pytest.fixture
def make_teacher(make_config):
    """A run of 4 steps that denoises."""
    changes = {"diffusion": DiffusionConfig(prediction="v"), "mask": NoMask(), "num_images": 16, "checkpoint_images": 8}
    return lambda **more: make_config(**{**changes, **more})


METHODS = {
    "sid": {"fake_updates": 2, "num_steps": 2, "trained_steps": "one"},
    "sida": {"method": "sida", "freeze_images": 4, "adversarial_from": 12, "hflip": 0.5},
    "dmd2": {"method": "dmd2", "fake_updates": 3, "input_level": 10.0, "micro_batch_size": 2},
    "fp16": {"precision": "fp16", "fake_updates": 3, "log_images": 4},
    "offloads": {"offload_idle": True},
    "consistency": {"kind": RegressionConfig, "method": "consistency", "images_per_stage": 8, "num_stages": 3},
    "dxmi": {"kind": PolicyDistillationConfig, "num_steps": 4, "value_width": 8},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_a_stop_in_between_changes_nothing(make_teacher, make_student, tmp_path, monkeypatch, changes):
    """SIGTERM in step 3, when a line of the log is half done; the rest comes later, without the run that the teacher
    came from."""
    train(make_teacher(), tmp_path / "teacher")
    config = make_student(**{"num_images": 32, "log_images": 16, "checkpoint_images": 100, **changes})
    train(config, tmp_path / "whole")
    stage = STAGES[type(config.stage)]
    take_step = stage.step

    def stopped(self, batches, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "step", stopped)
        result = train(config, tmp_path / "parts")
    assert (result.reason, result.step) == ("SIGTERM", 3)
    shutil.rmtree(tmp_path / "teacher")
    assert train(config, tmp_path / "parts").step == 8
    ends_as(tmp_path / "whole", tmp_path / "parts")


def test_what_a_run_logs(make_teacher, make_student, tmp_path):
    """Means of the updates that there were, whichever steps they fell into."""
    train(make_teacher(), tmp_path / "teacher")
    for each, log in (("lines", 4), ("mean", 24)):
        train(make_student(fake_updates=3, log_images=log), tmp_path / each)
    lines, (mean,) = (
        [row for row in read_metrics(tmp_path / each) if row["kind"] == "log"] for each in ("lines", "mean")
    )
    assert [number for number, row in enumerate(lines, 1) if "generator_loss" in row] == [3, 6]
    for name in ("loss", "grad_norm", "generator_loss", "generator_grad_norm", "distance", "finite_share"):
        values = [row[name] for row in lines if name in row]
        assert mean[name] == pytest.approx(sum(values) / len(values), rel=1e-6)
    bins = [name for name in mean if name.startswith("distance/")]
    assert 1 < len(bins) <= 6 and all(any(name in row for row in lines) for name in bins)
    assert mean["model_tflops"] > 0 and mean["tokens_per_s"] > 0


def test_scores_and_previews_of_a_student(make_teacher, make_student, tmp_path, monkeypatch):
    """In its own steps, whatever the options for denoising runs say."""
    monkeypatch.setattr(scores, "load_features", lambda name: MeanFeatures())
    train(make_teacher(), tmp_path / "teacher")
    output = {"score_images": 24, "score_num_images": 6, "score_steps": 50, "preview_images": 4}
    config = make_student(num_steps=2, checkpoint_images=24, **output)
    train(config, tmp_path / "run")
    (score,) = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "score"]
    assert score["step"] == 6
    assert (tmp_path / "run" / "samples" / "step-00000006.png").exists()


def test_a_student_can_be_exported_sampled_and_begun_with(make_teacher, make_student, tmp_path):
    train(make_teacher(), tmp_path / "teacher")
    train(make_student(num_steps=2), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "one.safetensors")
    run, file = load_weights(tmp_path / "run"), load_weights(tmp_path / "one.safetensors")
    assert run.config == file.config and run.config.stage.num_steps == 2
    images = [generate(each.config, each.tensors, 3, device=CPU) for each in (run, file)]
    assert torch.equal(*images) and images[0].shape == (3, 8, 8, 3)
    UViT(run.config.model).load_state_dict(run.tensors)  # the fake network is not part of it
    still = {"num_images": 4, "lr": 1e-30}
    beginnings = {
        "denoising": make_teacher(init_from="run", **still),
        "student": make_student(init_from="one.safetensors", **still),
    }
    for name, config in beginnings.items():
        train(config, tmp_path / name)
        found = load_weights(tmp_path / name, "raw").tensors
        assert all(torch.equal(found[key], tensor) for key, tensor in run.tensors.items()), name
    fake = checkpoint.newest(tmp_path / "student").tensors("fake_model")
    teacher = load_weights(tmp_path / "teacher").tensors
    assert all(torch.equal(fake[key], tensor) for key, tensor in teacher.items())


def test_a_recipe_hands_the_teacher_on(make_teacher, make_student, tmp_path):
    base = make_teacher()
    shared = {name: getattr(base, name) for name in ("data", "model", "diffusion", "machine", "output")}
    stages = (("pretrain", base.stage), ("finetune", base.stage), ("distill", make_student().stage))
    recipe = Recipe(stages=stages, **shared)
    result = train_recipe(recipe, tmp_path)
    assert result.folder == tmp_path / "3-distill" and result.step == 6
    assert read_metrics(tmp_path / "3-distill")[0]["config"]["stage"]["teacher"] == "2-finetune"
    assert train_recipe(recipe, tmp_path).step == 6


def test_a_generator_that_breaks_ends_the_run(make_teacher, make_student, tmp_path):
    """The fake network learns nothing from images that are none, so its loss says nothing."""
    train(make_teacher(), tmp_path / "teacher")
    config = make_student(lr=1e30, fake_lr=1e-6, max_grad_norm=None, log_images=1000, checkpoint_images=4)
    with pytest.raises(TrainingDivergedError, match=r"(generator_\w+|distance|loss) became NaN or infinite at step \d"):
        train(config, tmp_path / "run")
    good = checkpoint.newest(tmp_path / "run")
    assert good is None or all(tensor.isfinite().all() for tensor in good.tensors("model").values())


def test_a_run_without_a_data_set(make_teacher, make_student, tmp_path):
    train(make_teacher(), tmp_path / "teacher")
    train(make_student(), tmp_path / "with")
    train(make_student(data="none"), tmp_path / "without")
    ends_as(tmp_path / "with", tmp_path / "without")
    with pytest.raises(ValueError, match="data is none, but score-distillation learns from images"):
        train(make_student(data="none", method="dmd2"), tmp_path / "dmd2")


def test_options_that_decide_the_result_are_fixed(make_teacher, make_student, tmp_path):
    train(make_teacher(), tmp_path / "teacher")
    config = make_student(num_images=8)
    train(config, tmp_path / "run")
    other = replace(config, stage=replace(config.stage, fake_updates=2, teacher="elsewhere"))
    message = r"another configuration:\n  stage.fake_updates: None -> 2\n  stage.teacher: teacher -> elsewhere\n"
    with pytest.raises(ValueError, match=message):
        train(other, tmp_path / "run")
    assert isinstance(load_weights(tmp_path / "run").config.stage, ScoreDistillationConfig)
