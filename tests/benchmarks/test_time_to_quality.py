"""Equal budgets, shared pretraining, resuming and the report. No test looks at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import harness, time_to_quality, ttq_report, ttq_train
from benchmarks.ttq_plan import Arm, Budget, Method, Prices, Task, make_chains
from maskdm_fast.train import PRESETS, load_weights
from maskdm_fast.train.config import MachineConfig
from maskdm_fast.train.stages import DenoisingStage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.save. is deprecated:FutureWarning"),
]
ARMS = ["scratch", "patch:0.5@0.5", "patch:0.5@0.75"]
RUNS = ("scratch", "patch-0.5/pretrain", "patch-0.5/finetune-0.5", "patch-0.5/finetune-0.75")
MS = {"none": 20.0, "patch:0.5": 10.0}


class Means(nn.Module):
    """Stands in for the network of the scores, which is slow."""

    def forward(self, images: torch.Tensor, return_features: bool) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a cache and a feature network."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    return folder


@pytest.fixture
def command(world, tmp_path):
    """Runs the command line on tiny runs, whose step times are given, not measured."""

    def call(name, *more, out=tmp_path / "out"):
        arguments = [name, "--out", str(out)]
        if name != "report":
            arguments += ["--data", str(world / "images"), "--cache-dir", str(world / "cache"), "--preset", "smoke"]
            arguments += ["--arms", *ARMS, "--threads", "1", "--jobs", "1"]
        if name == "run":
            write_calibration(out)
            arguments += ["--budget", "0.4", "--seeds", "1", "--num-samples", "8", "--steps", "2"]
            arguments += ["--features", str(world / "means.pt")]
        return time_to_quality.main([*arguments, *more])

    return call


def write_calibration(out):
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "data": "images16",
            "mask": mask,
            "batch_size": 16,
            "num_visible": visible,
            "ms": ms,
            "images_per_s": 16e3 / ms,
        }
        for (mask, ms), visible in zip(MS.items(), (16, 8), strict=True)
    ]
    about = {"machine": {"cpu": "CPU", "cores": 2, "isa": None}, "versions": {"torch": "2"}, "commit": "abc"}
    calibration = {**about, "command": "calibrate", "threads": 2, "jobs": 1, "repeats": 3, "rows": rows}
    (out / "calibration.json").write_text(json.dumps(calibration))
    return calibration


def make_task(world):
    return Task.make(str(world / "images"), Method.of("smoke"), MachineConfig("cpu", cache_dir=str(world / "cache")))


def chains_of(world, out, seconds=0.4, arms=ARMS, seeds=(0,)):
    prices = Prices(write_calibration(out))
    return make_chains([make_task(world)], [Arm.parse(arm) for arm in arms], seeds, Budget(seconds), prices, out)


def points_of(out, run):
    return ttq_train.read_points(out / "images16/seed-0" / run)


def scores_of(out):
    """All that a repeated run must give again, to the bit."""
    return {
        run: [(point["fraction"], point["images"], point["fd"], point["kid"]) for point in points_of(out, run)]
        for run in RUNS
    }


def test_arms_have_a_text_form():
    for text in (*time_to_quality.ARMS, "crop:5@1"):
        assert str(Arm.parse(text)) == text
    for text in ("", "scratch@0.5", "block:0.75:4", "none@0.5", "patch:0.5@0", "patch:0.5@1.5", "patch:0.5@half"):
        with pytest.raises(ValueError, match=r"want scratch or MASK@SHARE|is not understood"):
            Arm.parse(text)


def test_default_arms_fit_the_default_preset():
    method = Method.of("emoji32")
    side = method.model.image_size // method.model.patch_size
    visible = [Arm.parse(arm).mask.num_visible((side, side)) for arm in time_to_quality.ARMS[1:]]
    assert visible == [32] * 3 + [16] * 3 + [8] * 3
    assert method.stages["scratch"] == PRESETS["emoji32-scratch"]().stage
    assert method.stages["finetune"] == dict(PRESETS["emoji32"]().stages)["finetune"]
    with pytest.raises(ValueError, match=r"no recipe of two stages; want one of .*emoji32"):
        Method.of("emoji32-scratch")


def test_every_arm_costs_the_budget(world, tmp_path):
    masked, scratch = chains_of(world, tmp_path, seconds=4.13)
    assert scratch.trunk.steps(1.0) * MS["none"] == pytest.approx(4130, abs=MS["none"] / 2)
    assert set(masked.branches) == {0.5, 0.75}
    for share, branch in masked.branches.items():
        cost = masked.trunk.steps(share) * MS["patch:0.5"] + branch.steps(1.0) * MS["none"]
        assert cost == pytest.approx(4130, abs=MS["none"])
        assert branch.config.stage.init_from == f"pretrain/checkpoints/step-{masked.trunk.steps(share):08d}"
    # The EMA's half-life is the same time in every run of a speed, and the masked runs see twice as many images.
    assert scratch.trunk.config.stage.ema_half_life_images == branch.config.stage.ema_half_life_images == 165
    assert masked.trunk.config.stage.ema_half_life_images == 330
    assert masked.trunk.stops == (0.25, 0.5, 0.75) and scratch.trunk.stops == (0.25, 0.5, 0.75, 1.0)


def test_repetitions_share_no_seed_and_come_one_after_the_other(world, tmp_path):
    chains = chains_of(world, tmp_path, seeds=(0, 1, 2))
    assert [chain.trunk.seed for chain in chains] == [0, 0, 1, 1, 2, 2]
    seeds = [{run.config.seed for run in chain.runs} for chain in chains]
    assert seeds == [{0, 1}, {0}, {2, 3}, {2}, {4, 5}, {4}]
    folders = [run.folder for chain in chains for run in chain.runs]
    assert len(set(folders)) == len(folders)


def test_a_hand_over_between_scores_is_a_stop_without_a_score(world, tmp_path):
    (chain,) = chains_of(world, tmp_path, arms=["patch:0.5@0.6", "patch:0.5@1"])
    assert chain.trunk.stops == (0.25, 0.5, 0.6, 0.75, 1.0) and 0.6 not in chain.trunk.scored
    assert set(chain.branches) == {0.6}


def test_what_cannot_be_planned_is_refused(world, tmp_path, command, capsys):
    with pytest.raises(ValueError, match="give a larger --budget"):
        chains_of(world, tmp_path, seconds=0.05)
    with pytest.raises(ValueError, match=r"no calibrated step time .* mask patch:0\.25"):
        chains_of(world, tmp_path, arms=["patch:0.25@0.5"])
    for fractions in ((), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="fractions"):
            Budget(1.0, fractions)
    for arguments, message in ((["report"], "run `python -m"), (["run", "--budget", "-1"], "want more than 0")):
        with pytest.raises(SystemExit):
            command(*arguments)
        assert message in capsys.readouterr().err


def test_calibrate_measures_what_run_needs(command, tmp_path, monkeypatch, capsys):
    about = harness.environment()
    monkeypatch.setattr(
        harness, "environment", lambda: {**about, "machine": {**about["machine"], "load_average": 1.25}}
    )
    assert command("calibrate", "--repeats", "1") == 0
    assert "other processes are running (load 1.25)" in capsys.readouterr().err
    calibration = json.loads((tmp_path / "out/calibration.json").read_text())
    assert {"machine", "versions", "commit", "command", "threads", "jobs", "repeats", "rows"} == set(calibration)
    rows = {(row["data"], row["mask"], row["batch_size"], row["num_visible"]) for row in calibration["rows"]}
    assert rows == {("images16", "none", 16, 16), ("images16", "patch:0.5", 16, 8)}
    assert all(row["ms"] > 0 and row["images_per_s"] > 0 for row in calibration["rows"])
    (tmp_path / "out/images16/seed-0").mkdir(parents=True)
    with pytest.raises(SystemExit):
        command("calibrate")
    assert "choose another --out" in capsys.readouterr().err


def test_run_scores_every_arm_and_goes_on(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert command("run", "--dry-run") == 0
    assert "4 runs, 0:01 of training" in capsys.readouterr().out
    assert not (out / "images16").exists()
    assert command("run") == 0
    scores = scores_of(out)
    assert [[point[0] for point in scores[run]] for run in RUNS] == [
        [0.25, 0.5, 0.75, 1.0],
        [0.25, 0.5, 0.75],
        [0.75, 1.0],
        [1.0],
    ]
    assert [scores[run][-1][1] for run in RUNS] == [20 * 16, 30 * 16, 10 * 16, 5 * 16]
    begun = load_weights(out / "images16/seed-0/patch-0.5/finetune-0.5").config.stage
    assert begun.init_from == "pretrain/checkpoints/step-00000020" and begun.init_weights == "ema"

    # Nothing is trained or scored twice.
    monkeypatch.setattr(ttq_train, "train", None)
    assert command("run") == 0
    assert scores_of(out) == scores
    with pytest.raises(SystemExit):
        command("run", "--num-samples", "9")
    assert "choose another folder with --out" in capsys.readouterr().err

    # A score that is lost cannot be made up for later, as the weights are gone.
    monkeypatch.undo()
    path = out / "images16/seed-0/scratch/scores.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "points": held["points"][1:]}))
    with pytest.raises(RuntimeError, match="its score is missing; remove"):
        command("run")


@pytest.mark.parametrize("where", ["training", "scoring"])
def test_a_killed_run_ends_with_the_same_scores(command, tmp_path, monkeypatch, where):
    assert command("run", out=tmp_path / "whole") == 0
    owner, name = (DenoisingStage, "step") if where == "training" else (ttq_train.Scorer, "score")
    function, calls = getattr(owner, name), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) in ((23, 60) if where == "training" else (2, 6)):
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(owner, name, killed)
    out = tmp_path / "killed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            command("run", out=out)
    assert command("run", out=out) == 0
    assert scores_of(out) == scores_of(tmp_path / "whole")


def test_chains_in_processes_of_their_own(world, tmp_path, capfd):
    """A chain that fails is reported and takes no other down."""
    masked, scratch = chains_of(world, tmp_path)
    scoring = ttq_train.Scoring(8, 2, "ddim", 24, str(world / "means.pt"))
    ttq_train.prepare(masked.task, scoring, tmp_path)
    broken = replace(masked.trunk, config=replace(masked.trunk.config, data=str(tmp_path / "nowhere")))
    chains = [replace(masked, trunk=broken, branches={}), scratch]
    assert ttq_train.run_chains(chains, scoring, jobs=2, threads=1, stop=lambda: False) == 1
    assert "nowhere" in capfd.readouterr().err
    assert len(points_of(tmp_path, "scratch")) == 4 and not points_of(tmp_path, "patch-0.5/pretrain")
    assert ttq_train.run_chains(chains, scoring, jobs=2, threads=1, stop=lambda: True) == 2


def fake_run(arms, kind, mask, start, seed, fds):
    stage = {"step_ms": 10.0, "batch_size": 16, "lr": 1e-3, "warmup_images": 10, "ema_half_life_images": 10}
    points = [
        {"fraction": f, "images": 99, "calibrated_seconds": 10.0, "train_seconds": 12.5, "fd": fd, "kid": fd / 1000}
        for f, fd in fds.items()
    ]
    return {
        "run": {"arms": arms, "kind": kind, "seed": seed, "mask": mask, "start": start, "budget": 100.0, **stage},
        "points": points,
    }


@pytest.fixture
def results(tmp_path):
    """What `collect` makes of two repetitions, the second of which is not finished."""
    out = tmp_path / "out"
    calibration = write_calibration(out)
    arms = ["patch:0.5@0.25", "patch:0.5@0.5"]
    runs = {}
    for seed, base in ((0, 100.0), (1, 110.0)):
        folder = f"seed-{seed}"
        runs[f"{folder}/scratch"] = fake_run(
            ["scratch"], "scratch", "none", 0.0, seed, {0.5: 300 + base, 1.0: 200 + base}
        )
        masked = {0.25: 400 + base, 0.5: 250 + base}
        runs[f"{folder}/patch-0.5/pretrain"] = fake_run(arms, "pretrain", "patch:0.5", 0.0, seed, masked)
        tuned = {0.5: 350.0, 1.0: 150.0} if seed == 0 else {0.5: 370.0}
        runs[f"{folder}/patch-0.5/finetune-0.25"] = fake_run(arms[:1], "finetune", "none", 0.25, seed, tuned)
    for name, run in runs.items():
        path = out / "images16" / name / "scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(run))
    settings = {"num_samples": 8, "num_steps": 2, "sampler": "ddim", "num_reference": 24}
    settings |= {"features": "means", "fd_name": "FD-means", "kid_name": "KID-means", "weights": "ema"}
    floor = {"fd": 12.0, "kid": 0.001, "num_images": 8, "num_reference": 16}
    about = {"attribution": "Drawn by nobody.", "num_images": 24}
    (out / "images16/floor.json").write_text(json.dumps({"settings": settings, "data": about, "floor": floor}))
    return ttq_report.collect(out, calibration)


def test_results_put_the_shared_part_into_every_arm(results):
    (result,) = results
    assert json.loads(json.dumps(result)) == result
    assert {"machine", "versions", "commit", "command", "calibration", "data", "settings", "floor", "budget"} <= set(
        result
    )
    rows = {(row["arm"], row["seconds"]): row for row in result["rows"]}
    assert [*rows] == [
        ("scratch", 50.0),
        ("scratch", 100.0),
        ("patch:0.5@0.25", 25.0),
        ("patch:0.5@0.25", 50.0),
        ("patch:0.5@0.25", 100.0),
        ("patch:0.5@0.5", 25.0),
        ("patch:0.5@0.5", 50.0),
    ]
    assert rows["scratch", 100.0]["fd"] == {"mean": 305.0, "std": pytest.approx(50**0.5), "values": [300.0, 310.0]}
    assert rows["patch:0.5@0.25", 100.0]["fd"] == {"mean": 150.0, "std": None, "values": [150.0]}
    assert [rows[f"patch:0.5@{share}", 50.0]["fd"]["mean"] for share in ("0.25", "0.5")] == [360.0, 355.0]
    phases = {key: row["phase"] for key, row in rows.items()}
    assert phases["patch:0.5@0.25", 50.0] == "finetune" and phases["patch:0.5@0.5", 50.0] == "pretrain"
    assert rows["scratch", 50.0]["slowdown"] == [1.25, 1.25]


def test_table_figure_and_page(results, tmp_path, monkeypatch):
    (result,) = results
    table = ttq_report.table(result)
    assert "| whole images | 16 |  | 405 ± 7 | **305** ± 7 | 0.305 ± 0.007 |" in table.replace("**0.305**", "0.305")
    assert "| `patch:0.5` for 25% | 8 of 16 | **505** ± 7 | 360 ± 14 | 150 (1) | 0.150 (1) |" in table
    assert "| `patch:0.5` for 50% | 8 of 16 | **505** ± 7 | **355** ± 7 |  |  |" in table
    assert "took 1.25 to 1.25 times as long" in table and "score 12 and 0.001 (8 against 16 others)" in table
    ttq_report.draw(result, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 300
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "time-to-quality-images16-cpu.json").write_text(json.dumps(result))
    page = ttq_report.updated(f"text\n{ttq_report.BEGIN}old\n{ttq_report.END}\nmore\n")
    assert table in page and "Drawn by nobody." in page and "old" not in page
    assert "![images16](time-to-quality-images16.png)" in page and page.endswith("<!-- end -->\nmore\n")
    with pytest.raises(ValueError, match="has no lines"):
        ttq_report.updated("text")


def test_report_writes_all_three(command, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    page = tmp_path / "docs" / "time-to-quality.md"
    page.parent.mkdir()
    page.write_text(ttq_report.BEGIN + ttq_report.END)
    monkeypatch.setattr(ttq_report, "PAGE", page)
    assert command("report") == 0
    (path,) = (tmp_path / "results").glob("*.json")
    assert path.name == "time-to-quality-images16-cpu-2c-reference.json"
    assert json.loads(path.read_text())["rows"] == results[0]["rows"]
    assert (page.parent / "time-to-quality-images16.png").exists()
    assert ttq_report.table(results[0]) in page.read_text()
    assert "whole images" in capsys.readouterr().out


def test_the_page_is_the_measured_one():
    text = ttq_report.PAGE.read_text()
    assert ttq_report.updated(text) == text, "run python -m benchmarks.time_to_quality report"
    for path in harness.RESULTS.glob("time-to-quality-*.json"):
        name = json.loads(path.read_text())["data"]["name"]
        assert ttq_report.PAGE.with_name(f"time-to-quality-{name}.png").exists()


def test_a_step_is_the_trainers_step(world, tmp_path):
    """Calibration times the weights' real update: after as many steps they are those of a run."""
    task = make_task(world)
    _, scratch = chains_of(world, tmp_path)
    built = []
    build = ttq_train.build_stage

    def remember(*arguments):
        built.append(build(*arguments))
        return built[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ttq_train, "build_stage", remember)
        step = ttq_train.step_function(scratch.trunk.config, task.store())
    config = scratch.trunk.until(0.25)
    ttq_train.train(config, tmp_path / "run")
    for _ in range(config.stage.num_images // config.stage.batch_size):
        step()
    trained = load_weights(tmp_path / "run").tensors
    for name, tensor in built[0].pieces()["ema"].items():
        assert torch.equal(tensor, trained[name]), name
