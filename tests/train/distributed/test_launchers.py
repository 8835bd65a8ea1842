"""The command line in several processes, and the programs that start them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys

import pytest

from maskdm_fast.train import checkpoint
from tests.train.distributed.conftest import Ended, answers
from tests.train.distributed.curves import curve
from tests.train.distributed.ports import free_port

SOON = 30.0


@pytest.fixture
def arguments(image_folder, cache_dir, tmp_path) -> list[str]:
    """Options of a run that keeps to this folder and the CPU."""
    folders = ["--data", str(image_folder), "--cache-dir", str(cache_dir), "--out", str(tmp_path / "run")]
    return [*folders, "--device", "cpu", "--log-images", "8", "--checkpoint-images", "16"]


def started(*command: str) -> str:
    """stdout of a launcher whose processes all end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parts(folder) -> set[str]:
    return {path.name for path in checkpoint.newest(folder).path.glob("model*")}


BOTH = {"model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"}


def test_torchrun_trains_a_recipe(arguments, tmp_path):
    engine = "zero3" if importlib.util.find_spec("deepspeed") else "ddp"
    sizes = ["--pretrain.num-images", "32", "--pretrain.batch-size", "8"]
    sizes += ["--finetune.num-images", "32", "--finetune.batch-size", "8"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "maskdm_fast"]
    out = started(*launcher, "train", "smoke", *arguments, *sizes, "--engine", engine)
    assert out.count("ended by num_images") == 1, out  # said by one of them
    for stage in ("1-pretrain", "2-finetune"):
        assert parts(tmp_path / "run" / stage) == BOTH
        assert [row[0] for row in curve(tmp_path / "run" / stage)] == [1, 2, 3, 4]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_deepspeed_launcher(arguments, tmp_path):
    """With the argument that it appends; on one machine it needs no ssh."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    sizes = ["--num-images", "16", "--batch-size", "8", "--engine", "ddp"]
    started(*launcher, "maskdm_fast", "train", "smoke-pretrain", *arguments, *sizes)
    assert parts(tmp_path / "run") == BOTH and len(curve(tmp_path / "run")) == 2


@pytest.fixture
def command(server, arguments, tmp_path):
    """``maskdm-fast train smoke-pretrain`` in two processes, with the faults of each rank."""

    def start(*options: str, faults: dict[int, dict]) -> list[Ended]:
        words = ["train", "smoke-pretrain", *arguments, "--num-images", "64", "--batch-size", "8", *options]
        ranks = [{"command": words, "faults": faults.get(rank, {})} for rank in (0, 1)]
        return answers(server, ranks, tmp_path / "logs", 60.0)

    return start


def test_a_killed_process_ends_the_command(command, tmp_path):
    dead, other = command("--engine", "ddp", faults={0: {"signal_in_step": {"step": 5, "signal": signal.SIGKILL}}})
    assert dead.code == -signal.SIGKILL
    assert other.code == 2, other.log
    assert other.seconds - dead.seconds < SOON
    message = (
        r"maskdm-fast \[rank 1\]: error: lost contact with another process, which has ended or is out of reach \(.*\) "
        r"in step 6\. The same command goes on from step 4"
    )
    assert re.search(message, other.log) and "Traceback" not in other.log, other.log
    assert checkpoint.newest(tmp_path / "run").step == 4


def test_an_error_that_nobody_expected_ends_the_command(command):
    """A bug in one process: its traceback, and an end of both."""
    ended = command("--engine", "ddp", faults={1: {"bug_in_step": {"step": 5}}})
    assert ended[1].code == 1 and "AttributeError" in ended[1].log and "Traceback" in ended[1].log, ended[1].log
    assert ended[0].code == 2 and "error: lost contact with another process" in ended[0].log, ended[0].log
    assert max(one.seconds for one in ended) < SOON


def test_a_full_disk_is_said_once_for_each_process(command, tmp_path):
    ended = command("--engine", "ddp", faults={1: {"full_disk_in_save": 4}})
    assert [one.code for one in ended] == [2, 2]
    assert "maskdm-fast [rank 1]: error: cannot write checkpoint" in ended[1].log, ended[1].log
    assert "maskdm-fast [rank 0]: error: rank 1: CheckpointError: cannot write checkpoint" in ended[0].log
    assert checkpoint.newest(tmp_path / "run").step == 2


def test_a_batch_that_cannot_be_shared(command):
    first, second = command("--batch-size", "7", faults={})
    assert (first.code, second.code, second.log) == (2, 2, "")  # said once
    assert "maskdm-fast [rank 0]: error: batch_size 7 cannot be divided evenly among 2 processes" in first.log
