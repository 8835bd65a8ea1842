"""The comparison of students with their teacher, on runs of a few steps."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import distill, harness
from maskdm_fast.eval import FeatureNetwork
from maskdm_fast.train import PRESETS
from maskdm_fast.train.config import MachineConfig, OutputConfig

SID = "emoji32-distill-sid"


class MeanFeatures(FeatureNetwork):
    """Stands in for the network of the scores, which is slow."""

    name, kernel_name, num_features, fingerprint = "FD-mean", "KID-mean", 12, "mean"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The presets, with a few images of a small network each."""
    teacher = PRESETS["emoji32"]()
    model = replace(teacher.model, image_size=16, dim=16, depth=3, num_heads=2)
    shared = {"model": model, "machine": MachineConfig(device="cpu"), "output": OutputConfig()}
    short = {"num_images": 8, "batch_size": 4}
    stages = tuple((name, replace(stage, **short)) for name, stage in teacher.stages)
    student = PRESETS[SID]()
    presets = {
        "emoji32": lambda: replace(teacher, **shared, stages=stages),
        SID: lambda: replace(student, **shared, stage=replace(student.stage, **short)),
    }
    monkeypatch.setattr(distill, "PRESETS", presets)
    monkeypatch.setattr(distill, "load_features", lambda name: MeanFeatures())
    monkeypatch.setattr(distill, "TEACHER_STEPS", (3, 10))
    monkeypatch.setattr(distill, "STUDENTS", (SID,))
    monkeypatch.setattr(distill, "BATCH_SIZE", 4)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_all_are_trained_scored_and_timed(small, monkeypatch, capsys):
    command = ["--json", "--save", "--threads", "1", "--repeats", "1", "--num-images", "16"]
    command += ["--runs", str(small / "runs"), "--figure", str(small / "figure.png")]
    distill.main(command)
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    rows = result["rows"]
    assert [(row["run"], row["steps"]) for row in rows] == [("emoji32", 3), ("emoji32", 10), (SID, 1)]
    assert all(row["fd_lite0"] > 0 and row["images_per_s"] > 0 and row["images_trained"] == 8 for row in rows)
    assert len({row["fd_lite0"] for row in rows}) == 3
    assert (small / "figure.png").read_bytes().startswith(b"\x89PNG")
    (saved,) = (small / "results").iterdir()
    assert json.loads(saved.read_text()) == result
    # What is trained is not trained again.
    distill.main(command[2:])
    out = capsys.readouterr().out
    assert SID in out and "speed: against the teacher's ten steps" in out
    assert "images/s, " not in out
    # Four images in 50, 100 and 10 ms.
    monkeypatch.setattr(
        harness, "interleave", lambda draws, repeats: dict(zip(draws, (50.0, 100.0, 10.0), strict=True))
    )
    distill.main([*command[:1], *command[2:]])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [(row["speed"], row["images_per_s"]) for row in rows] == [(2.0, 80.0), (1.0, 40.0), (10.0, 400.0)]


def test_every_student_of_the_presets_is_compared():
    assert SID in distill.STUDENTS
    assert all(name in PRESETS for name in distill.STUDENTS)
