"""TensorBoard with its real package; Weights & Biases with a stand-in that records what it is given."""

import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskdm_fast.train import checkpoint, read_metrics, train


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def logs(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder) if record["kind"] == "log"]


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.points, self.metrics, self.finished = settings, [], [], 0

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        assert not self.finished
        self.points.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """The parts of wandb that are used, and the runs that were begun."""
    module = types.ModuleType("wandb")
    module.runs, module.Error, module.Image = [], type("Error", (Exception,), {}), lambda path: ("image", path)

    def init(**settings):
        module.runs.append(FakeRun(**settings))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_tensorboard_mirrors_the_metrics(make_config, tmp_path):
    train(make_config(trackers=("tensorboard",), preview_images=2), tmp_path)
    found, records = events(tmp_path), logs(tmp_path)
    machine = {"seconds", "images_per_s", "tokens_per_s", "model_tflops", "peak_mib"}
    split = {"data_ms", "forward_ms", "backward_ms", "optimizer_ms"}
    assert set(found.Tags()["scalars"]) == {"loss", "mask_ratio", "grad_norm", "lr"} | machine | split
    for name in ("loss", "grad_norm", "lr"):
        points = [(event.step, event.value) for event in found.Scalars(name)]
        assert points == [(record["images"], pytest.approx(record[name])) for record in records]
    assert [event.step for event in found.Images("preview")] == [16, 32, 48]
    assert found.Images("preview")[0].width == 8 * 2 + 3 * 2  # two images of 8 px and their gutters


def test_a_resumed_run_has_one_tensorboard_curve(make_config, tmp_path):
    """The newest checkpoint is damaged, so points that were written already come again."""
    config = make_config(trackers=("tensorboard",))
    train(replace(config, stage=replace(config.stage, num_images=32)), tmp_path)
    shutil.rmtree(checkpoint.newest(tmp_path).path)
    train(config, tmp_path)
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [8, 16, 24, 32, 40, 48]


def test_wandb_mirrors_the_metrics_and_goes_on_with_one_run(make_config, tmp_path, wandb):
    config = make_config(trackers=("wandb",), preview_images=2)
    folder = tmp_path / "mine"
    train(replace(config, stage=replace(config.stage, num_images=24)), folder)
    train(config, folder)
    first, second = wandb.runs
    assert first.finished == second.finished == 1
    assert first.settings["project"] == "maskdm_fast" and first.settings["name"] == "mine"
    assert first.settings["config"]["stage"]["lr"] == config.stage.lr
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"
    assert first.metrics == [("images", None), ("*", "images")]
    losses = [(p["images"], p["loss"]) for run in wandb.runs for p in run.points if "loss" in p]
    assert losses == [(record["images"], record["loss"]) for record in logs(folder)]
    assert [p["images"] for run in wandb.runs for p in run.points if "preview" in p] == [16, 24, 32, 48]
    assert all("kind" not in p and "step" not in p for p in first.points)


def test_wandb_follows_its_environment(make_config, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "faces")
    train(make_config(trackers=("wandb",)), tmp_path)
    assert wandb.runs[0].settings["project"] == "faces"
    assert "mode" not in wandb.runs[0].settings  # an argument would override WANDB_MODE


def test_wandb_without_a_key_says_what_to_do(make_config, tmp_path, wandb):
    def init(**settings):
        raise wandb.Error("no API key")

    wandb.init = init
    with pytest.raises(RuntimeError, match=r"cannot begin: no API key\. Run 'wandb login', or set WANDB_MODE=offline"):
        train(make_config(trackers=("wandb",)), tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_shows_before_work_starts(make_config, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=rf"'{name}' is not installed; .*pip install 'maskdm_fast\[track\]'"):
        train(make_config(trackers=(name,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
