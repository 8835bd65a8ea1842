"""Scores during training. A cheap network of features stands in for EfficientNet."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from maskdm_fast.eval import FeatureNetwork, compare, compute_features
from maskdm_fast.train import checkpoint, load_weights, read_metrics, scores, train
from maskdm_fast.train.generation import generate
from maskdm_fast.train.runs import fit_to_classes, open_store
from maskdm_fast.train.world import World


class MeanFeatures(FeatureNetwork):
    name, kernel_name, num_features, fingerprint = "FD-lite0", "KID-lite0", 12, "mean"
    delay = 0.0

    def forward(self, images):
        time.sleep(self.delay)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(autouse=True)
def cheap_features(monkeypatch):
    monkeypatch.setattr(scores, "load_features", lambda name: MeanFeatures())


@pytest.fixture
def make_scored(make_config):
    return lambda **changes: make_config(
        **{"score_images": 16, "score_num_images": 6, "score_steps": 2, "checkpoint_images": 24, **changes}
    )


def lines(folder) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in read_metrics(folder)
        if record["kind"] == "score"
    ]


def tensors(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.newest(folder).path.glob("*.safetensors")}


def test_scores_come_on_schedule_and_at_the_end(make_scored, tmp_path):
    config = make_scored(num_images=40)
    train(config, tmp_path)
    found = lines(tmp_path)
    assert [record["images"] for record in found] == [16, 32, 40]
    weights = load_weights(tmp_path)
    samples = generate(weights.config, weights.tensors, 6, num_steps=2, device=torch.device("cpu"))
    real = compute_features(open_store(config).images, MeanFeatures())
    want = compare(samples, real, MeanFeatures(), seed=0)
    assert found[-1] == {
        "kind": "score",
        "step": 10,
        "images": 40,
        "fd_lite0": want.fd,
        "fd_lite0_floor": want.fd_floor,
        "kid_lite0": want.kid,
        "kid_lite0_floor": want.kid_floor,
        "num_generated": 6,
        "num_reference": 24,
    }


def test_scores_change_nothing_and_resuming_changes_no_score(make_scored, tmp_path):
    config = make_scored()
    train(config, tmp_path / "whole")
    train(replace(config, output=replace(config.output, score_images=0)), tmp_path / "unscored")
    assert lines(tmp_path / "unscored") == []
    assert tensors(tmp_path / "unscored") == tensors(tmp_path / "whole")
    # Falls back to image 24, so that the score at 32 is dropped and computed again.
    train(replace(config, stage=replace(config.stage, num_images=36)), tmp_path / "parts")
    newest = checkpoint.newest(tmp_path / "parts").path
    os.truncate(newest / "ema.safetensors", 10)
    with pytest.warns(RuntimeWarning, match="falling back"):
        train(config, tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    train(config, tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_signal_does_not_wait_for_a_score(make_scored, tmp_path, monkeypatch):
    """It comes while the checkpoint is written at which a score is due; the resumed run makes up for it."""
    config = make_scored(checkpoint_images=16)
    train(config, tmp_path / "whole")
    real = checkpoint._write_tensors

    def write(path, tensors):
        if "step-00000004" in str(path):
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", write)
        assert train(config, tmp_path / "parts").reason == "SIGTERM"
    assert lines(tmp_path / "parts") == []
    train(config, tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_falling_back_repeats_no_score(make_scored, tmp_path):
    """Also when the file holds scores that came after the checkpoint."""
    config = make_scored(checkpoint_images=16)
    train(config, tmp_path)
    before = lines(tmp_path)
    steps = [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "score"]
    newest = checkpoint.newest(tmp_path)
    assert len(steps) > 1 and steps[-1] == newest.step
    shutil.rmtree(newest.path)
    assert checkpoint.newest(tmp_path).step == steps[-2]
    train(config, tmp_path)
    assert lines(tmp_path) == before


def test_scores_do_not_count_as_training(make_scored, tmp_path, monkeypatch):
    monkeypatch.setattr(MeanFeatures, "delay", 0.1)
    real, scoring = MeanFeatures.forward, []

    def timed(self, images):
        start = time.monotonic()
        features = real(self, images)
        scoring.append(time.monotonic() - start)
        return features

    monkeypatch.setattr(MeanFeatures, "forward", timed)
    start = time.monotonic()
    seconds = train(make_scored(), tmp_path).seconds
    assert len(scoring) >= 3  # one for each score, at least
    assert seconds <= time.monotonic() - start - sum(scoring)


def test_large_references_are_drawn_and_kept(make_scored, tmp_path, monkeypatch, cache_dir):
    monkeypatch.setattr(scores, "MAX_REFERENCE", 10)
    train(make_scored(), tmp_path / "first")
    assert {record["num_reference"] for record in lines(tmp_path / "first")} == {10}
    files = {path: path.stat().st_mtime_ns for path in cache_dir.glob("features-*")}
    train(make_scored(seed=1), tmp_path / "second")
    assert {path: path.stat().st_mtime_ns for path in cache_dir.glob("features-*")} == files


def test_missing_packages_show_before_work_starts(make_scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(RuntimeError, match=r"'torchmetrics' is not installed; .*maskdm_fast\[eval\]"):
        train(make_scored(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scores_are_mirrored_under_a_name_of_their_own(make_scored, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_scored(trackers=("tensorboard",)), tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("score/fd_lite0")] == [16, 32, 48]
    assert json.dumps(lines(tmp_path))


def test_samples_have_the_classes_of_the_data_set(make_scored, image_folder, tmp_path, cache_dir):
    """A conditional network is asked for classes as frequent as they are, also for more images than there are."""
    for number, file in enumerate(sorted(image_folder.iterdir())):
        target = tmp_path / "images" / ("common" if number < 18 else "rare")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    config = make_scored(data=str(tmp_path / "images"), class_conditional=True, score_num_images=48)
    store = open_store(config)
    config = fit_to_classes(config, store.class_names)
    asked = []

    class Stage:
        def preview(self, num_images, *, labels, num_steps):
            asked.append((num_images, labels.bincount().tolist(), num_steps))
            return torch.from_numpy(store.images.copy()).repeat(2, 1, 1, 1)

    scorer = scores.Scorer(config, store, cache_dir=cache_dir, world=World(torch.device("cpu")))
    found = scorer(Stage())
    assert asked == [(48, [36, 12], 2)]
    assert found["fd_lite0"] == pytest.approx(0.0, abs=1.0) and found["num_generated"] == 48
