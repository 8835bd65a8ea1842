"""The peak of memory that the CPU's processes report."""

import subprocess
import sys

CODE = """
import torch
from maskdm_fast.ops import backend
cpu = torch.device("cpu")
backend.synchronize(cpu)
before = backend.peak_memory(cpu)
block = torch.ones(64 << 20)
del block
print(before, backend.peak_memory(cpu))
"""


def test_peak_memory_is_that_of_the_process():
    """What was freed counts, what the parent held does not: Linux hands getrusage's peak on to started programs."""
    parents = bytearray(1 << 30)
    parents[::4096] = b"x" * len(parents[::4096])
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, close_fds=False)
    before, after = map(int, done.stdout.split())
    assert 50 << 20 < before < 900 << 20
    assert 240 << 20 < after - before < 300 << 20
