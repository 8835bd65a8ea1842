"""A run may stop under one engine and number of processes and go on under another."""

import shutil
from dataclasses import replace

import pytest

from maskdm_fast.train import checkpoint
from tests.train.distributed.conftest import on
from tests.train.distributed.curves import bits, far, far_weights

PARTS = [
    (("plain", 1, None), ("zero3", 2, None), ("plain", 1, None), ("ddp", 2, None)),
    (("ddp", 2, None), ("zero1", 2, None), ("zero2", 2, 2), ("zero3-offload", 2, None)),
    (("zero3-offload", 2, 2), ("zero3", 2, None), ("ddp", 2, 2), ("zero2", 1, None)),
    (("zero1", 1, None), ("zero3", 2, 2), ("zero1", 2, None), ("plain", 1, 2)),
]
STOPS = (5, 10, 15, 20)  # in the middle of a mean of the log, and at its end


def until(config, step):
    """The same run, up to this step."""
    return replace(config, stage=replace(config.stage, num_images=step * config.stage.batch_size))


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a damaged checkpoint
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(f"{engine}:{count}" for engine, count, _ in parts))
def test_another_engine_and_number_of_processes(make_run, reference, finish, tmp_path, parts):
    make_run("zero1")  # or skip
    for (engine, processes, micro), stop in zip(parts, STOPS, strict=True):
        ended = finish(on(until(make_run(), stop), engine, micro), tmp_path / "run", processes)
        assert [one.result for one in ended] == [{"reason": "num_images", "step": stop}] * processes
        files = {path.name for path in checkpoint.newest(tmp_path / "run").path.glob("*.safetensors")}
        assert len(files) == 3 * processes
    assert far(reference(), tmp_path / "run") < 1e-5
    for which in ("raw", "ema"):
        assert far_weights(reference(), tmp_path / "run", which) < 1e-4


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        *(("ddp", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16"), ("zero3-offload", "fp32")),
    ],
)
def test_the_same_engine_goes_on_bit_for_bit(make_run, finish, tmp_path, engine, precision):
    config = make_run(engine, precision=precision)
    finish(config, tmp_path / "run")
    whole = bits(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    assert checkpoint.newest(tmp_path / "run").step == 15  # in the middle of a mean
    finish(config, tmp_path / "run")
    assert (bits(tmp_path / "run") == whole) is True  # without pytest's comparison of files
