import json
from dataclasses import replace

import pytest
import torch

from maskdm_fast import demo
from maskdm_fast.eval.features import FeatureNetwork
from maskdm_fast.train import load_weights, read_metrics


class MeanFeatures(FeatureNetwork):
    """Stands in for the network of the scores, which is slow."""

    name, kernel_name, num_features, fingerprint = "FD-mean", "KID-mean", 12, "mean"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(autouse=True)
def small_world(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "demo-cache"))
    monkeypatch.setattr(demo, "load_features", MeanFeatures)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def options(tmp_path):
    return demo.DemoOptions(smoke=True, minutes=0.005, out=str(tmp_path / "demo"), device="cpu")


def seconds_of(folder):
    return load_weights(folder).checkpoint.state["seconds"]


def test_demo_compares_two_arms_at_equal_time(options, tmp_path, capsys):
    assert demo.run(options) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "demo"
    for text in (out, (folder / "summary.txt").read_text()):
        for word in (
            "masked pretrain + finetune",
            "from scratch, unmasked",
            "its one-step student (SiD)",
            "draws in one step instead of 5",
            "real images (floor)",
            "images/s",
            "CC-BY",
        ):
            assert word in text
    html = (folder / "report.html").read_text()
    assert "data:image/png" in html and "http://" not in html.replace("http://www.w3.org", "")
    masked = seconds_of(folder / "masked/1-pretrain") + seconds_of(folder / "masked/2-finetune")
    scratch = seconds_of(folder / "scratch")
    assert masked == pytest.approx(0.3, abs=0.15) and scratch == pytest.approx(0.3, abs=0.15)
    assert seconds_of(folder / "distilled") >= 0.15
    assert "one step, seed 0" in html
    header = read_metrics(folder / "masked/2-finetune")[0]
    assert header["config"]["stage"]["init_from"] == "1-pretrain"

    # A second call trains nothing, and says so.
    before = (folder / "scratch/metrics.jsonl").read_text()
    assert demo.run(options) == 0
    assert "was finished before" in capsys.readouterr().out
    assert (folder / "scratch/metrics.jsonl").read_text() == before

    with pytest.raises(ValueError, match="was begun with"):
        demo.run(replace(options, seed=1))


def test_an_interrupted_demo_goes_on(options, tmp_path, monkeypatch, capsys):
    calls = []
    train = demo.train

    def interrupted(config, folder, **keywords):
        calls.append(folder)
        if len(calls) == 3:
            keywords["signals"].received = "SIGTERM"
        return train(config, folder, **keywords)

    monkeypatch.setattr(demo, "train", interrupted)
    assert demo.run(options) == 0
    assert "Interrupted; the same command goes on." in capsys.readouterr().out
    assert not (tmp_path / "demo/report.html").exists()
    begun = seconds_of(tmp_path / "demo/masked/1-pretrain")
    assert demo.run(options) == 0
    assert (tmp_path / "demo/report.html").exists()
    assert seconds_of(tmp_path / "demo/masked/1-pretrain") == begun
    assert json.loads((tmp_path / "demo/demo.json").read_text())["smoke"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": float("nan")}, "--minutes is nan, want more than 0, and finite"),
        ({"minutes": float("inf")}, "--minutes is inf"),
        ({"minutes": -1.0}, "--minutes is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_cannot_work_leave_no_folder(changes, message, options, tmp_path):
    """A folder that they had claimed would refuse the corrected command."""
    with pytest.raises(ValueError, match=message):
        demo.run(replace(options, **changes))
    assert not (tmp_path / "demo").exists()


def test_a_damaged_record_is_named(options, tmp_path):
    path = tmp_path / "demo/demo.json"
    path.parent.mkdir()
    path.write_text("")
    with pytest.raises(ValueError, match=f"{path} cannot be read .*, or remove {path.parent}"):
        demo.run(options)


def test_plan_shares_everything_but_the_mask():
    plan = demo.make_plan(demo.DemoOptions())
    configs = demo._configs(plan, demo.DemoOptions())
    finetune, scratch = configs["masked/2-finetune"].stage, configs["scratch"].stage
    assert replace(finetune, init_from=None) == scratch
    assert configs["distilled"].stage.teacher == "masked/2-finetune"
    assert {config.seed for config in configs.values()} == {0}
    assert {config.model for config in configs.values()} == {plan.model}
    for config in configs.values():
        replace(config, stage=replace(config.stage, max_seconds=1.0)).validate()
