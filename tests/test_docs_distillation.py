"""The commands of docs/distillation.md can be given, and those of distillation by regression run on tiny networks."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast import cli
from maskdm_fast.train import PRESETS, load_weights, train
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, MachineConfig, RunConfig
from maskdm_fast.train.distill_config import DistillationConfig
from tests.test_docs_training import OPTIONS, ROOT, check_command, command_lines, launcher_and_command
from tests.train.regression_toys import CASES

TEXT = (ROOT / "docs" / "distillation.md").read_text()
SECTION = TEXT.split("\n### Fewer steps by regression")[1].split("\n### ")[0]
TINY = ["--num-images", "4", "--batch-size", "2", "--warmup-images", "0", "--device", "cpu", "--preview-images", "0"]


@pytest.mark.parametrize("line", [line for line in command_lines(TEXT) if launcher_and_command(line)[2]])
def test_command_can_be_given(line):
    check_command(line)


def flags_of(preset, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", preset, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", capsys.readouterr().out))


def test_every_option_that_is_named_exists(capsys):
    known = {flag for kind in OPTIONS.values() for flag in cli._flags(kind)} | {"--dry-run", "--json", "--repeats"}
    known |= {"--save", "--standalone", "--nproc-per-node"}  # of benchmarks.distill and torchrun
    for preset in ("emoji32-distill-sid", "emoji32-distill-guided", "emoji32-distill-dxmi"):
        known |= flags_of(preset, capsys)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", TEXT))
    assert len(named) > 30 and not named - known


def test_every_preset_of_emoji_is_named():
    """And every method has one, so that its options can be given."""
    names = [name for name in PRESETS if name.startswith("emoji32-distill-")]
    assert [name for name in names if f"train {name}" not in TEXT and f"`{name}`" not in TEXT] == []
    stages = [PRESETS[name]().stage for name in names if isinstance(PRESETS[name](), RunConfig)]
    assert all(isinstance(stage, DistillationConfig) for stage in stages)
    methods = {getattr(stage, "method", None) for stage in stages if not callable(getattr(stage, "method", None))}
    assert methods == {"sid", "sida", "dmd2", *(case.get("method", "consistency") for case in CASES.values())}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Teachers of 4 images in the folder `runs`, and a folder of photos with two classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    preset = PRESETS["smoke-pretrain"]()
    for name, prediction, conditional in (
        ("emoji32", "v", False),
        ("emoji32-classes", "v", True),
        ("mine", "eps", False),
    ):
        stage = DenoisingConfig(num_images=4, batch_size=2, label_drop=0.1 if conditional else 0.0)
        config = RunConfig(
            data="photos",
            model=preset.model,
            diffusion=DiffusionConfig(prediction=prediction),
            machine=MachineConfig(device="cpu"),
            class_conditional=conditional,
            stage=stage,
        )
        train(config, tmp_path / "runs" / name)
    yield tmp_path / "runs"
    torch.set_num_threads(threads)


def test_students_by_regression(runs, capsys):
    """Every command of the section but those of teachers and recipes, in its order; each student then makes images."""
    lines = [line for line in command_lines(SECTION) if not re.search(r"train emoji32-classes|-progressive", line)]
    assert len(lines) == 9
    for line in lines:
        _, command, arguments = launcher_and_command(line)
        more = TINY + ["--data", "photos"] if command == "train" else ["--num-images", "2", "--device", "cpu"]
        assert cli.main([command, *arguments, *more]) == 0, capsys.readouterr().err
    students = {path.name for path in runs.iterdir()} - {"emoji32", "emoji32-classes", "mine"}
    assert len(students) == 8
    for name in students:
        assert cli.main(["sample", str(runs / name), "--num-images", "2", "--device", "cpu"]) == 0, name
    steps = {name: load_weights(runs / name).config.stage.sampling_steps for name in students}
    assert steps == {
        "emoji32-distill-round": 16, "steps8": 8, "guided16": 16, "emoji32-distill-guided": 50, "mine-v": 50,
        "emoji32-distill-consistency": 1, "two-steps": 2, "tuned": 1,
    }  # fmt: skip
    assert load_weights(runs / "mine-v").config.diffusion.prediction == "v"
