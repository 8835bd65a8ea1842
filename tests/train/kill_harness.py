"""Trains in a child process that is killed again and again, until the run has finished.

    python kill_harness.py CONFIG.json RUN_FOLDER MODE SEED

MODE ``random``: SIGKILL after a random time; ``saving``: as soon as a checkpoint is being written; ``never``. torch is
imported once and children are forked before it computes anything, so a life costs milliseconds. Prints how many
    kills there were.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from maskdm_fast.train import RunConfig, checkpoint, train


def child(config: RunConfig, run: Path) -> None:
    torch.set_num_threads(1)
    write = checkpoint._write_tensors

    def slow_write(path, tensors):
        time.sleep(0.004)  # a larger target for the killer
        write(path, tensors)

    checkpoint._write_tensors = slow_write
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - closed by the kill
    train(config, run)


def wait_for_target(run: Path, mode: str, draw: random.Random) -> None:
    """Return when it is time to kill."""
    if mode == "random":
        time.sleep(draw.uniform(0.1, 0.4))
        return
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any((run / "checkpoints").glob(".tmp-step-*")):
            time.sleep(draw.uniform(0.0, 0.016))  # anywhere from the first file to the rename
            return
        time.sleep(0.0005)


def main() -> None:
    config = RunConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    run, mode, draw = Path(sys.argv[2]), sys.argv[3], random.Random(int(sys.argv[4]))
    for life in range(60):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(config, run)
                code = 0
            finally:
                os._exit(code)
        # A run must be able to end, so the last lives are left alone.
        if mode != "never" and life < 8:
            wait_for_target(run, mode, draw)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed by itself"
            print(life)
            return
    raise AssertionError("the run never finished")


if __name__ == "__main__":
    main()
