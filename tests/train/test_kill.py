"""A run that is killed at any moment ends with the same bits as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.train import checkpoint, read_metrics, train
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig

HARNESS = Path(__file__).with_name("kill_harness.py")


@pytest.fixture(params=["denoising", "student"])
def kill_config(request, make_config, make_student, tmp_path):
    """200 steps with a checkpoint every 10; of score distillation with two optimizers."""
    sizes = {"num_images": 800, "checkpoint_images": 40, "log_images": 48}
    if request.param == "denoising":
        return make_config(**sizes)
    train(make_config(diffusion=DiffusionConfig(prediction="v"), mask=NoMask(), num_images=4), tmp_path / "teacher")
    return make_student(teacher=str(tmp_path / "teacher"), fake_updates=3, **sizes)


def run_under(mode: str, config, folder: Path, seed: int) -> int:
    folder.mkdir()
    path = folder / "wanted.json"
    path.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, str(HARNESS), str(path), str(folder / "run"), mode, str(seed)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return int(out.stdout)


def outcome(run: Path) -> tuple[dict[str, bytes], list[tuple]]:
    """Bytes of every tensor file of the last checkpoint, and the curve."""
    newest = checkpoint.newest(run)
    files = {path.name: path.read_bytes() for path in newest.path.glob("*.safetensors")}
    curve = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in read_metrics(run) if r["kind"] == "log"]
    return files, curve


def same(a: tuple, b: tuple) -> bool:
    """Equality without pytest's comparison of megabytes when it fails."""
    return a == b


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a killed process must never leave a damaged checkpoint
def test_kill_9_at_any_moment(kill_config, tmp_path):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed of the moments: {seed}")
    run_under("never", kill_config, tmp_path / "whole", seed)
    files, curve = outcome(tmp_path / "whole" / "run")
    assert len(files) == (3 if isinstance(kill_config.stage, DenoisingConfig) else 5) and len(curve) == 16
    for mode in ("random", "saving"):
        assert run_under(mode, kill_config, tmp_path / mode, seed) >= 2
        assert same(outcome(tmp_path / mode / "run"), (files, curve))
        left = [path.name for path in (tmp_path / mode / "run" / "checkpoints").iterdir()]
        assert sorted(left) == ["step-00000190", "step-00000200"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0(make_config, tmp_path, number):
    config = make_config(num_images=10**8, checkpoint_images=10**8, log_images=400)
    path = tmp_path / "wanted.json"
    path.write_text(json.dumps(config.to_dict()))
    code = (
        "import json, sys\n"
        "from maskdm_fast.train import RunConfig, train\n"
        "print(train(RunConfig.from_dict(json.load(open(sys.argv[1]))), sys.argv[2]).reason)\n"
    )
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Bits depend on the number of threads, and the run it is compared with has one.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.strip() == number.name
    stopped = checkpoint.newest(run)
    assert stopped.step >= 200 and stopped.state["config"] == config.to_dict()
    # The steps up to the signal are those of an undisturbed run.
    train(replace(config, stage=replace(config.stage, num_images=stopped.step * 4)), tmp_path / "whole")
    assert same(outcome(run), outcome(tmp_path / "whole"))
