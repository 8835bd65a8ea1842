"""float16 with a loss scale in several processes, through overflows and growth."""

import shutil

import pytest

from maskdm_fast.train import read_metrics
from tests.train.distributed.curves import bits, far

SCALE = {"loss_scale": {"initial": 2.0**26, "growth_interval": 4}}  # overflows at first, and again when it has grown
SCALES = {0: SCALE, 1: SCALE}


def scales(folder):
    """Mean loss scale and skipped steps so far, of every line of the log."""
    logs = [record for record in read_metrics(folder) if record["kind"] == "log"]
    return [(log["loss_scale"], log["skipped_steps"]) for log in logs]


def test_processes_see_the_curve_of_one(make_run, finish, tmp_path):
    """While nothing overflows: the gradient of a process is larger than its part of the mean, and overflows earlier."""
    finish(make_run(precision="fp16"), tmp_path / "alone", 1)
    for number, micro in enumerate((None, 2)):
        finish(make_run("ddp", precision="fp16", micro_batch_size=micro), tmp_path / str(number))
        assert scales(tmp_path / str(number)) == scales(tmp_path / "alone") == [(2.0**16, 0)] * 10
        assert far(tmp_path / "alone", tmp_path / str(number)) < 1e-4


def test_an_overflow_in_one_process_is_skipped_by_all(make_run, finish, tmp_path):
    config, overflow = make_run("ddp", precision="fp16"), {"factor_in_step": {"step": 6, "factor": 1e30}}
    finish(config, tmp_path / "one", faults={1: overflow})
    finish(config, tmp_path / "both", faults={0: overflow, 1: overflow})
    assert scales(tmp_path / "one") == [(2.0**16, 0)] * 3 + [(2.0**15, 1)] * 7
    assert (bits(tmp_path / "one") == bits(tmp_path / "both")) is True  # without pytest's comparison of files


@pytest.mark.parametrize("engine", ["plain", "ddp"])
def test_goes_on_bit_for_bit(make_run, finish, tmp_path, engine):
    config, run, processes = make_run(engine, precision="fp16"), tmp_path / "run", 1 if engine == "plain" else 2
    finish(config, run, processes, faults=SCALES)
    whole, wanted = bits(run), scales(run)
    assert len(whole[1]) == 3 * processes + 1  # and the loss scale, once
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    finish(config, run, processes, faults=SCALES)
    assert (bits(run) == whole) is True  # without pytest's comparison of files
    assert scales(run) == wanted


def test_zero_needs_a_device_that_computes_in_fp16(make_run, launch, tmp_path):
    """DeepSpeed's accelerator for the CPU does not."""
    for one in launch(make_run("zero2", precision="fp16"), tmp_path / "run"):
        assert "ValueError: engine zero2 computes in float16 on GPUs only" in one.error, one.log
