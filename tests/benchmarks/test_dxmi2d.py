"""The plane experiment of DxMI: its measures, its smallest run, and what it writes."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import dxmi2d, harness
from benchmarks.dxmi2d import Judge, Recipe

SMALL = Recipe(iterations=3, batch=8, pretrain_steps=2, evaluate=64, projections=16)


def test_data_are_the_published_ones():
    x = dxmi2d.sample_data(20_000, seed=0)[:, 0]
    assert x.var(dim=0).tolist() == pytest.approx([4.12, 4.12], rel=0.03)
    nearest = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round() % 8
    assert torch.bincount(nearest.long(), minlength=8).min() > 2200
    assert x.norm(dim=1).mean().item() == pytest.approx(2.85, abs=0.02)


def test_sliced_wasserstein_of_a_shift():
    """Moving all points by v costs ``|v| / sqrt(2)``, the root mean square of its projections."""
    x = dxmi2d.sample_data(500, seed=0)[:, 0]
    shifted = x + torch.tensor([0.6, 0.8])
    assert dxmi2d.sliced_wasserstein(x, shifted, 4000, seed=0) == pytest.approx(math.sqrt(0.5), rel=0.03)
    assert dxmi2d.sliced_wasserstein(x, x.flip(0), 16, seed=0) == 0.0


def test_reference_quantities():
    """Data against data, and the AUC of the true density."""
    sw, auc = Judge(Recipe(projections=200), 0).floor()
    assert sw < 0.08
    assert auc == pytest.approx(0.902, abs=0.008)


def test_the_teacher_starts_where_the_paper_does():
    steps = dxmi2d.ddpm_policy(
        dxmi2d.teacher_schedule(), alpha_bars=dxmi2d.teacher_schedule().alpha_bar.flip(0).tolist(), std="beta"
    ).steps
    assert [step.std for step in steps] == pytest.approx([0.0999, 0.0976, 0.0708, 0.022, 0.0059], rel=5e-3)
    assert [step.t for step in steps] == pytest.approx([4, 3, 2, 1, 0], abs=1e-6)


def test_runs_are_functions_of_their_seed():
    first, again, other = (dxmi2d.run(0.1, True, seed, SMALL) for seed in (0, 0, 1))
    assert torch.equal(first.samples, again.samples)
    assert (first.sw, first.auc) == (again.sw, again.auc)
    assert not torch.equal(first.samples, other.samples)
    scratch = dxmi2d.run(0.1, False, 0, SMALL)
    assert not torch.equal(first.samples, scratch.samples)


def test_numbers_are_the_same_one_by_one(monkeypatch):
    samples = []
    for chunk in (1, 50):
        monkeypatch.setattr(dxmi2d, "_CHUNK", chunk)
        samples.append(dxmi2d.run(0.1, False, 0, SMALL).samples)
    assert torch.equal(*samples)


def test_what_is_judged_is_the_running_mean():
    """Of the weights after each iteration, which a mean that forgets all else shows; it forgets faster at first."""

    def weights(iterations, ema):
        models = dxmi2d.train(0.1, False, 0, dataclasses.replace(SMALL, iterations=iterations, ema=ema))
        return [parameter.detach() for model in models for parameter in model.parameters()]

    first, second = weights(1, 0.0), weights(2, 0.0)
    one = weights(1, 0.995)
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    # 1/10 of the start and 9/10 of the first weights, then 2/11 of that and 9/11 of the second.
    for ema, decay in ((0.995, 2 / 11), (0.15, 0.15)):
        for mean, last, trained in zip(one, weights(2, ema), second, strict=True):
            torch.testing.assert_close(last, torch.lerp(mean, trained, 1 - decay))
    start = list(dxmi2d.PointValue(2, dxmi2d.NUM_STEPS + 1, hidden=128, seed=1).parameters())
    for before, mean, trained in zip(start, one[-len(start) :], first[-len(start) :], strict=True):
        torch.testing.assert_close(mean, torch.lerp(before.detach(), trained, 0.9))


def test_the_energy_is_judged_by_data_against_noise(monkeypatch):
    """The true density comes to what the table calls so."""
    policy, _ = dxmi2d.train(0.1, False, 0, SMALL)
    monkeypatch.setattr(dxmi2d, "train", lambda *args: (policy, lambda x, t: -dxmi2d.log_density(x)))
    assert dxmi2d.run(0.1, False, 0, SMALL).auc == Judge(SMALL, 0).floor()[1] > 0.5


class InThisProcess:
    """A pool that keeps what the test has changed."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        result = function(*args)
        return type("Done", (), {"result": lambda self: result})()


def test_json_and_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(dxmi2d, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(dxmi2d, "Recipe", lambda iterations: dataclasses.replace(SMALL, iterations=iterations))
    monkeypatch.setattr(dxmi2d.Recipe, "iterations", 2, raising=False)
    monkeypatch.setattr(dxmi2d, "SEEDS", 2)
    dxmi2d.main(["--json", "--save", "--figure", str(tmp_path / "a" / "b.png")])
    result = json.loads(capsys.readouterr().out)
    assert {"machine", "versions", "commit", "command", "recipe", "floor", "rows"} <= set(result)
    assert [(row["tau"], row["pretrain"]) for row in result["rows"]] == list(dxmi2d.PAPER)
    for row in result["rows"]:
        assert list(row) == ["tau", "pretrain", "sw_mean", "sw_std", "auc_mean", "auc_std", "seconds"]
        assert row["sw_mean"] > 0
        assert 0 <= row["auc_mean"] <= 1
    (saved,) = tmp_path.glob("dxmi2d-*.json")
    assert json.loads(saved.read_text()) == result
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    text = dxmi2d.table(result)
    assert "0.068" in text
    assert "0.898" in text
