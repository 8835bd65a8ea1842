import json
import math
import time

import pytest
import torch

from maskdm_fast.train.metrics import (
    METRICS_NAME,
    Meter,
    MetricsLog,
    Stopwatch,
    TrainingDivergedError,
    machine,
    package_versions,
    read_metrics,
)
from maskdm_fast.train.world import World


def steps(folder, kind="log"):
    return [record["step"] for record in read_metrics(folder) if record["kind"] == kind]


def test_log_drops_what_lies_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, 0, {"versions": {}})
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0})
    log.close()
    MetricsLog(tmp_path, 20, {}).close()
    assert steps(tmp_path) == [10, 20]
    assert steps(tmp_path, "header") == [0, 20]
    MetricsLog(tmp_path, 0, {}).close()
    assert steps(tmp_path) == [] and steps(tmp_path, "header") == [0]


def test_a_torn_last_line_is_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0, {})
    log.write({"step": 10, "loss": 1.0})
    log.close()
    with open(tmp_path / METRICS_NAME, "a") as file:
        file.write('{"kind": "log", "step": 2')
    assert steps(tmp_path) == [10]
    MetricsLog(tmp_path, 10, {}).close()
    assert [json.loads(line)["kind"] for line in (tmp_path / METRICS_NAME).read_text().splitlines()] == [
        "header",
        "log",
        "header",
    ]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / METRICS_NAME).write_text('{"kind": "header", "step": 0}\nnonsense\n{}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_metrics(tmp_path)


def test_not_finite_values_stay_json(tmp_path):
    log = MetricsLog(tmp_path, 0, {})
    log.write({"step": 1, "loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path)[-1]["loss"] is None


def test_meter_means_and_state():
    meter = Meter(World(torch.device("cpu")))
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        meter.update({"loss": torch.tensor(loss)}, step)
    meter.check()
    resumed = Meter(World(torch.device("cpu")))
    resumed.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for each in (meter, resumed):
        each.update({"loss": torch.tensor(0.1)}, 4)
    means = meter.means()
    assert means == resumed.means() == {"loss": pytest.approx(9.1 / 4)}
    meter.update({"loss": torch.tensor(5.0)}, 5)
    assert meter.means() == {"loss": 5.0}


def filled(rows: list[dict], first: int = 1) -> Meter:
    meter = Meter(World(torch.device("cpu")))
    fill(meter, rows, first)
    return meter


def fill(meter: Meter, rows: list[dict], first: int = 1) -> None:
    """Tell a meter values, and pairs of sums and weights."""
    for step, row in enumerate(rows, start=first):
        meter.update(
            {
                name: tuple(map(torch.tensor, value)) if isinstance(value, tuple) else torch.tensor(value)
                for name, value in row.items()
            },
            step,
        )


ROWS = [
    {"loss": 1.0},
    {"loss": 3.0, "other": 10.0, "part": (6.0, 2.0), "none": (0.0, 0.0)},
    {"loss": 8.0},
    {"loss": 4.0, "other": 30.0, "part": (1.0, 5.0), "none": (0.0, 0.0)},
]


def test_means_are_of_the_steps_that_had_a_value_and_of_pairs_by_their_weights():
    meter = filled(ROWS)
    meter.check()
    assert meter.means() == {"loss": 4.0, "other": 20.0, "part": 1.0}
    assert meter.means() == {}
    fill(meter, ROWS[:1], 5)
    assert meter.means() == {"loss": 1.0}


@pytest.mark.parametrize("stop", range(5))
def test_a_meter_goes_on_with_steps_of_different_values(stop):
    resumed = Meter(World(torch.device("cpu")))
    resumed.load_state_dict(json.loads(json.dumps(filled(ROWS[:stop]).state_dict())))
    fill(resumed, ROWS[stop:], stop + 1)
    assert resumed.means() == filled(ROWS).means()


NAN = float("nan")
SKIPPED = [
    {"skipped": 1.0, "loss": NAN, "other": NAN, "part": (NAN, 1.0), "loss_scale": 8.0},
    {"skipped": 1.0, "loss": NAN},
]


def test_skipped_steps_count_in_no_mean():
    meter = filled([{"skipped": 0.0, **row} for row in ROWS[:2]] + SKIPPED)
    meter.check()
    assert meter.means() == {"loss": 2.0, "other": 10.0, "part": 3.0, "skipped_steps": 2, "loss_scale": 8.0}


@pytest.mark.parametrize("stop", range(2))
def test_where_all_steps_were_skipped_there_is_no_mean_to_tell(stop):
    """The loss scale is told as it was last, though steps without a generator's update do not have it."""
    resumed = Meter(World(torch.device("cpu")))
    resumed.load_state_dict(json.loads(json.dumps(filled(SKIPPED[:stop]).state_dict())))
    fill(resumed, SKIPPED[stop:], stop + 1)
    for meter in (filled(SKIPPED), resumed):
        meter.check()
        means = meter.means()
        assert means.pop("loss_scale") == 8.0 and means.pop("skipped_steps") == 2
        assert means.keys() == {"loss", "other"} and all(map(math.isnan, means.values()))


def test_divergence_is_that_of_the_first_step_whatever_values_it_had():
    rows = [{"loss": 1.0}, {"loss": 1.0, "other": NAN}, {"loss": NAN}]
    with pytest.raises(TrainingDivergedError, match="other became NaN or infinite at step 2"):
        filled(rows).check()
    with pytest.raises(TrainingDivergedError, match="part became NaN or infinite at step 1"):
        filled([{"loss": 1.0, "part": (NAN, 1.0)}]).check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_meter_names_the_first_bad_step(bad):
    meter = Meter(World(torch.device("cpu")))
    for step, (loss, norm) in enumerate([(1.0, 1.0), (1.0, bad), (bad, bad), (1.0, 1.0)], start=1):
        meter.update({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}, step)
    with pytest.raises(TrainingDivergedError, match="grad_norm became NaN or infinite at step 2"):
        meter.check()


def test_stopwatch_stands_still_when_paused():
    watch = Stopwatch(100.0)
    with watch.paused():
        before = watch.seconds
        time.sleep(0.02)
        assert watch.seconds == before
    after = watch.seconds
    assert 100.0 <= before <= after < before + 0.01
    time.sleep(0.01)
    assert watch.seconds >= after + 0.009


def test_description_of_the_machine_is_json():
    assert package_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    json.dumps(machine())
