"""What a run tells about itself: tokens, memory, the split of a step; and how it ends when a step hangs."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.ops import backend
from maskdm_fast.train import checkpoint, read_metrics, train
from maskdm_fast.train.stages import DenoisingStage
from maskdm_fast.train.watchdog import STALLED_EXIT_CODE
from maskdm_fast.train.world import World

SPLIT = ("data_ms", "forward_ms", "backward_ms", "optimizer_ms")


def logs(folder):
    return [record for record in read_metrics(folder) if record["kind"] == "log"]


def test_tokens_memory_and_the_split_of_a_step(make_config, tmp_path):
    """8 of 16 patches are visible, and there is one extra token; one of two steps is split."""
    train(make_config(micro_batch_size=2), tmp_path)
    records = logs(tmp_path)
    assert len(records) == 6
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(9 * record["images_per_s"])
        assert 50 < record["peak_mib"] < 2**20
        assert all(record[name] > 0 for name in SPLIT) and "communication_ms" not in record
    # Parts of one step cannot take longer than the interval that it is a part of.
    for before, record in itertools.pairwise(records):
        assert sum(record[name] for name in SPLIT) <= (record["seconds"] - before["seconds"]) * 1e3 + 1.0


def test_tokens_follow_the_mask(make_config):
    """Half of the images are whole; without the others' mask all are, from image 24 on."""
    config = make_config(unmasked_share=0.5, mask_schedule=MaskSchedule("steps", ((0.0, 24),)), engine="plain")
    stage = DenoisingStage.build(config, World(torch.device("cpu")), None)
    assert [stage.tokens_per_image(step) for step in (0, 5, 6)] == pytest.approx([1 + 12, 1 + 12, 1 + 16])


@pytest.mark.parametrize("log_images", [8, 16])
def test_only_the_steps_before_a_log_line_wait(make_config, tmp_path, monkeypatch, log_images):
    """Data, forward, backward, optimizer: a wait at both ends of each, in one step per log line."""
    waits = []
    monkeypatch.setattr(backend, "synchronize", waits.append)
    train(make_config(log_images=log_images), tmp_path)
    assert len(waits) == len(logs(tmp_path)) * 4 * 2


@pytest.mark.parametrize("stall_seconds", [0.0, -1.0, float("nan")])
def test_a_limit_must_be_positive(make_config, stall_seconds):
    with pytest.raises(ValueError, match=r"stall_seconds is .*, want (more than 0|a finite number)"):
        make_config(stall_seconds=stall_seconds).validate()


HANG = """
import json, sys, time
import torch
from maskdm_fast.train import RunConfig, train
from maskdm_fast.train.stages import DenoisingStage

torch.set_num_threads(1)
real = DenoisingStage.step

def step_that_hangs(self, batches, step):
    if step == 5:
        time.sleep(600)
    return real(self, batches, step)

def slow_preview(self, num_images, **options):
    time.sleep(2.5)
    return torch.zeros(num_images, 8, 8, 3, dtype=torch.uint8)

DenoisingStage.step, DenoisingStage.preview = step_that_hangs, slow_preview
train(RunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def test_a_run_that_hangs_ends_and_goes_on_from_its_checkpoint(make_config, tmp_path):
    """A preview that takes as long as a hanging step would live is waited for; step 6 hangs."""
    config = make_config(stall_seconds=1.0, preview_images=1)
    done = subprocess.run(
        [sys.executable, "-c", HANG, json.dumps(config.to_dict()), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == STALLED_EXIT_CODE, done.stderr
    reports = done.stderr.split("maskdm-fast: watchdog of rank 0 of 1")[1:]
    assert ["step 5 (checkpoint)" in report and "slow_preview" in report for report in reports] == [True, False, False]
    assert ["step 6 (train)" in report and "step_that_hangs" in report for report in reports] == [False, True, True]
    assert checkpoint.newest(tmp_path).step == 4
    assert train(replace(config, output=replace(config.output, preview_images=0)), tmp_path).step == 12
