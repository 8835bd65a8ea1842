import json
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
