"""The watchdog in processes that hang; most of them load nothing but its module, which needs nothing but Python."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

from maskdm_fast.train import watchdog as watchdog_module
from maskdm_fast.train.watchdog import STALLED_EXIT_CODE, Watchdog

LOAD = f"""
import importlib.util, os, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("watchdog", {watchdog_module.__file__!r})
watchdog = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watchdog)
Watchdog = watchdog.Watchdog
"""


def run(code: str, *, timeout: float = 30.0) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of a process."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LOAD + code], capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stderr, time.monotonic() - start


def test_a_stalled_step_is_reported_and_ended():
    """The main thread hangs in C code; reported once at the limit, ended at twice the limit."""
    code, report, seconds = run(
        """
def hang_in_a_read():
    os.read(os.pipe()[0], 1)

def wait_beside_it():
    threading.Event().wait()

threading.Thread(target=wait_beside_it, name="helper", daemon=True).start()
dog = Watchdog(0.5, rank=3, world_size=8)
dog.beat(17, "backward")
hang_in_a_read()
"""
    )
    assert code == STALLED_EXIT_CODE
    assert 1.0 <= seconds < 5.0
    first, last = report.split("maskdm-fast: ")[1:]
    for text in (first, last):
        assert re.search(r"watchdog of rank 3 of 8 \(.+, pid \d+\): step 17 \(backward\) has taken \d+\.\d s; ", text)
        assert "hang_in_a_read" in text and "watchdog.py" not in text
    assert "the process ends at 1 s (--stall-seconds 0.5)" in first and "wait_beside_it" not in first
    assert f"exit code {STALLED_EXIT_CODE}" in last and "Thread MainThread (watched):" in last
    assert "Thread helper:" in last and "wait_beside_it" in last


def test_a_paused_phase_only_reports_and_the_clock_starts_again():
    code, report, _ = run(
        """
def write_slowly():
    time.sleep(1.5)

dog = Watchdog(0.5)
dog.beat(4)
with dog.paused("checkpoint"):
    write_slowly()
time.sleep(0.2)
dog.beat(5)
time.sleep(0.2)
dog.close()
"""
    )
    assert code == 0
    (text,) = report.split("maskdm-fast: ")[1:]
    assert "step 4 (checkpoint) has taken" in text and "the run goes on" in text and "write_slowly" in text


def test_a_stall_after_a_pause_ends():
    code, report, _ = run(
        """
dog = Watchdog(0.2)
dog.beat(4)
with dog.paused("checkpoint"):
    pass
time.sleep(60)
"""
    )
    assert code == STALLED_EXIT_CODE and "step 4 (train)" in report


def test_nothing_ends_before_the_first_beat():
    code, report, _ = run("dog = Watchdog(0.1); time.sleep(0.5); dog.close()")
    assert code == 0 and "step 0 (start)" in report


def test_steps_within_the_limit_are_not_reported():
    code, report, _ = run(
        """
dog = Watchdog(0.6)
for step in range(8):
    dog.beat(step)
    time.sleep(0.1)
dog.close()
assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
"""
    )
    assert (code, report) == (0, "")


def test_a_stopped_process_is_not_stalled():
    """Stopped for longer than a stalled one would live; by itself, so that no time passes before."""
    code = LOAD + "dog = Watchdog(1.5)\ndog.beat(1)\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.3)\ndog.close()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        time.sleep(3.2)
        os.kill(process.pid, signal.SIGCONT)
        _, report = process.communicate(timeout=20)
    assert process.returncode == 0, report


def test_a_full_pipe_does_not_keep_the_process_alive():
    """The main thread hangs while it writes to stderr, whose lock it holds."""
    reader, writer = os.pipe()
    code = LOAD + "watchdog._WRITE_SECONDS = 0.2\ndog = Watchdog(0.2)\ndog.beat(1)\nprint('x' * 10**7, file=sys.stderr)"
    try:
        process = subprocess.run([sys.executable, "-c", code], stderr=writer, timeout=20)
    finally:
        os.close(writer)
        os.close(reader)
    assert process.returncode == STALLED_EXIT_CODE


RANK = """
import os, sys, time
import torch
import torch.distributed as dist
from maskdm_fast.train.watchdog import Watchdog

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
dist.barrier()
dog = Watchdog(1.0 if rank else 5.0, rank=rank, world_size=2)
dog.beat(2)

def the_culprit():
    time.sleep(600)

if rank == 1:
    the_culprit()
dist.all_reduce(torch.ones(4))
"""


def test_the_other_rank_ends_when_the_stalled_one_is_ended(tmp_path):
    """Long before its own limit, for the connection closes."""
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        reports = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == STALLED_EXIT_CODE and "the_culprit" in reports[1]
    assert "rank 1 of 2" in reports[1]
    assert processes[0].returncode == 1 and "all_reduce" in reports[0] and "watchdog" not in reports[0]
    assert time.monotonic() - start < 50


def test_no_thread_remains(capsys):
    before = set(threading.enumerate())  # other tests may end theirs meanwhile
    dog = Watchdog(600.0)
    dog.beat(1)
    (mine,) = set(threading.enumerate()) - before
    dog.close()
    assert not mine.is_alive() and capsys.readouterr().err == ""


def test_a_limit_longer_than_a_thread_can_wait():
    dog = Watchdog(float("inf"))
    time.sleep(0.05)
    assert "watchdog" in [thread.name for thread in threading.enumerate()]
    dog.close()


def test_a_thread_that_is_not_the_main_one_can_be_watched(tmp_path):
    with open(tmp_path / "report", "w+") as file:

        def loop_elsewhere():
            dog = Watchdog(0.1, file=file)
            time.sleep(0.4)
            dog.close()

        thread = threading.Thread(target=loop_elsewhere)
        thread.start()
        thread.join()
        file.seek(0)
        assert "loop_elsewhere" in file.read()
