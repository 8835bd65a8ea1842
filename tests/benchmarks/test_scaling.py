"""The scaling benchmark in its smallest form: contestants in processes of their own, and what fails in them."""

import json
import os

import pytest

from benchmarks import harness, readme, scaling
from benchmarks.scaling import PEER, Team, Workload
from maskdm_fast.models import UViTConfig
from maskdm_fast.train.memory import ENGINES

TINY = Workload(UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2), 4, 0.75, "fp32")


def test_json(tmp_path, monkeypatch, capsys):
    """Losses agree in one process and in two, or nothing would be timed. Without DeepSpeed, which takes each process
    seconds to import: how its engines train is tested elsewhere."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "WORKLOAD", TINY)
    monkeypatch.setattr(scaling, "_SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(scaling, "ENGINES", ("plain", "ddp", PEER))
    monkeypatch.setattr(scaling, "_counts", lambda: [1, 2])
    compared, check = [], scaling.check_parity
    monkeypatch.setattr(
        scaling, "check_parity", lambda losses, tolerance: (compared.append(list(losses)), check(losses, tolerance))
    )
    before = dict(os.environ)
    scaling.main(["--json", "--save", "--repeats", "1", "--threads", "1"])
    assert dict(os.environ) == before
    result = json.loads(capsys.readouterr().out)
    assert {"machine", "versions", "commit", "command", "workload", "rows", "estimates"} <= set(result)
    assert [(row["engine"], row["processes"]) for row in result["rows"]] == [
        *(("plain", 1), (PEER, 1)),
        *(("ddp", 2), (PEER, 2)),
    ]
    assert compared == [["plain in 1", f"{PEER} in 1"], ["plain in 1", f"{PEER} in 1", "ddp in 2", f"{PEER} in 2"]]
    for row in result["rows"]:
        assert list(row) == ["engine", "processes", "images_per_s", "peak_mib"]
        assert row["images_per_s"] > 0 and row["peak_mib"] > 50
    (saved,) = tmp_path.glob("scaling-*.json")
    assert json.loads(saved.read_text()) == result
    assert f"{PEER:<15}{1:>10}" in scaling.table(result)
    peer, ddp = result["rows"][3], result["rows"][2]
    ratio = f"{ddp['images_per_s'] / peer['images_per_s']:.2f} x"
    assert f"| `ddp` |  |  |  | {ddp['images_per_s']:.1f} | {ratio} |" in readme.scaling_tables(result)


def test_teams_take_turns():
    """Each sample is that of the slowest process; of three the median counts."""
    order = []

    class Scripted:
        def __init__(self, engine, *seconds):
            self.engine, self.seconds = engine, iter(seconds)

        def ask(self, what, count):
            order.append(self.engine)
            seconds = next(self.seconds) * count
            return [seconds, seconds / 2]

    teams = [Scripted("a", 1.0, 3.0, 1.0, 2.0), Scripted("b", 0.1, 0.1, 7.0, 0.2)]
    assert scaling._interleave(teams, 3) == pytest.approx({"a": 2.0, "b": 0.2})
    assert "".join(order) == "ab" + "abbaab"


def test_a_process_that_fails_is_named():
    team = Team(TINY, "ddp", 1, threads=1)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)ddp, rank 0 of 1: .*engine ddp is for several processes"):
            team.ask("losses", 1)
    finally:
        team.close()


def test_losses_that_differ_are_found():
    scaling.check_parity({"plain in 1": [1.0, 0.5], "ddp in 2": [1.00001, 0.500001]}, 1e-4)
    with pytest.raises(AssertionError, match=r"step 1: loss 0\.51 of ddp in 2, but 0\.5 of plain in 1"):
        scaling.check_parity({"plain in 1": [1.0, 0.5], "ddp in 2": [1.0, 0.51]}, 1e-4)


def test_contestants_by_number_of_processes():
    assert scaling.contestants(scaling.ENGINES, 1) == [engine for engine in scaling.ENGINES if engine != "ddp"]
    assert scaling.contestants(scaling.ENGINES, 2) == [engine for engine in scaling.ENGINES if engine != "plain"]
    assert scaling.ENGINES[:-1] == ENGINES


def test_an_uneven_batch_is_refused(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--batch", "33", "--processes", "2"])
    assert "must be a multiple" in capsys.readouterr().err


def test_estimates_fall_from_engine_to_engine():
    for row in scaling.estimates():
        sizes = list(row["gib"].values())
        assert list(row["gib"]) == list(ENGINES[1:]) and sizes == sorted(sizes, reverse=True)
        assert row["host_gib"]["zero3-offload"] > 0 == row["host_gib"]["zero3"]
