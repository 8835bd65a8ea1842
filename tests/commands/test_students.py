"""Students by the commands: trained, exported, sampled and scored in their own steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm_fast.train import load_weights


@pytest.fixture(scope="session")
def trained(conditional_run):
    """Where the student lies, once it is trained."""
    return conditional_run.parent / "student"


@pytest.fixture
def student(trained, conditional_run, real, run, capsys) -> Path:
    """A generator of two steps, distilled from `conditional_run` by the command."""
    if not trained.exists():
        options = ("--data", real, "--class-conditional", "--device", "cpu", "--log-images", 16)
        sizes = ("--num-images", 32, "--batch-size", 8, "--num-steps", 2, "--preview-images", 4)
        teacher = ("--teacher", conditional_run, "--guidance", "lsg", "--guidance-scale", 1.5)
        assert run("train", "emoji32-distill-sid", *options, *sizes, *teacher, "--out", trained) == 0
        assert "as the teacher" in capsys.readouterr().err
    return trained


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def test_a_student_is_exported_and_sampled(student, tmp_path, run, capsys):
    assert load_weights(student).config.model.num_classes == 3
    assert run("export", student, "one.safetensors") == 0
    for name, source in (("run", student), ("file", "one.safetensors")):
        assert run("sample", source, "--per-class", 2, "--seed", 4, "--out", name) == 0
    files = sorted(path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*.png"))
    assert len(files) == 6
    for file in files:
        assert np.abs(pixels(tmp_path / "run" / file) - pixels(tmp_path / "file" / file)).max() == 0
    line = json.loads((tmp_path / "run" / "manifest.jsonl").read_text().splitlines()[0])
    assert line["steps"] == 2 and line["seed"] == 4
    assert run("sample", student, "--num-images", 3, "--steps", 2, "--out", "grid.png") == 0
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 4), "the run is a generator of 2 steps, but 4 were asked for"),
        (
            ("--sampler", "heun"),
            "the run is a generator, which has its own sampler: leave out sampler, eta",
        ),
        (("--eta", 0.5), "leave out sampler, eta and guidance"),
        (("--guidance", 2.0), "leave out sampler, eta and guidance"),
        (("--guidance-interval", 0.1, 1), "leave out sampler, eta and guidance"),
    ],
)
def test_what_a_student_has_no_choice_of(student, run, capsys, options, message):
    for command in (("sample", student, "--num-images", 2), ("evaluate", student, "--num-images", 8)):
        assert run(*command, *options, "--out", "out.json" if command[0] == "evaluate" else "out.png") == 2
        assert message in capsys.readouterr().err


def test_a_student_is_scored_beside_its_teacher(student, conditional_run, real, run, capsys, tmp_path):
    """Without steps each is drawn in its own."""
    assert run("evaluate", student, "--data", real, "--num-images", 12, "--out", "student.json") == 0
    result = json.loads((tmp_path / "student.json").read_text())
    assert result["sets"][0]["name"] == str(student) and result["options"]["steps"] is None
    capsys.readouterr()
    sides = (student, conditional_run)
    assert run("evaluate", *sides, "--data", real, "--num-images", 12, "--steps", 2, "--out", "both.json") == 0
    assert len(json.loads((tmp_path / "both.json").read_text())["sets"]) == 2


def test_a_student_goes_on_by_the_same_command(student, conditional_run, real, run, capsys):
    options = ("--data", real, "--class-conditional", "--device", "cpu", "--num-steps", 2, "--batch-size", 8)
    teacher = ("--teacher", conditional_run, "--guidance", "lsg")
    command = ("train", "emoji32-distill-sid", *options, *teacher, "--out", student)
    assert run(*command, "--guidance-scale", 3, "--num-images", 40) == 2
    assert "stage.guidance_scale: 1.5 -> 3.0" in capsys.readouterr().err
    assert run(*command, "--guidance-scale", 1.5, "--num-images", 40) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--teacher", "nowhere"),
            "no such run or checkpoint folder: nowhere (--teacher nowhere)",
        ),
        (("--adversarial", 0.1), "method sid has no adversarial; leave it out"),
        (("--method", "dmd2", "--alpha", 1.0), "method dmd2 has no alpha; leave it out"),
        (("--guidance", "teacher"), "guidance is teacher, but the model has no classes; add --class-conditional"),
        (("--guidance-scale", 2.0), "guidance mode 'none' has no scale, but 2.0 was given; want teacher or lsg"),
        (("--num-steps", 0), "num_steps is 0, want at least 1"),
        (("--fake-updates", 0), "fake_updates is 0, want more than 0, or None"),
        (("--cuda-graph",), "cuda_graph records denoising only, not distillation; leave out --cuda-graph"),
    ],
)
def test_errors(grey_run, real, run, capsys, options, message):
    common = ("--data", real, "--channels", 1, "--device", "cpu", "--num-images", 8, "--batch-size", 4)
    assert run("train", "emoji32-distill-sid", "--teacher", grey_run, *common, *options, "--out", "run") == 2
    assert message in capsys.readouterr().err


def test_a_student_without_data_is_scored_against_a_set_that_is_named(conditional_run, real, run, capsys):
    options = ("--data", "none", "--device", "cpu", "--num-images", 16, "--batch-size", 8, "--preview-images", 0)
    assert run("train", "emoji32-distill-sid", "--teacher", conditional_run, *options, "--out", "free") == 0
    assert run("evaluate", "free", "--num-images", 8) == 2
    assert "no run with a data set, so --data must say which real images" in capsys.readouterr().err
    assert run("evaluate", "free", "--num-images", 8, "--data", real) == 0
