"""The CUDA kernels on the host: how the tests of this folder build them and send operators to them.

The library is built with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtime must come first in a process.
So test_sanitized.py starts the other files of this folder in such processes, and only there they are collected.
"""

import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast import testing

LIBRARY = os.environ.get("MASKDM_EMULATED_LIBRARY")

_files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = sorted({"test_sanitized.py"} if LIBRARY else _files - {"test_sanitized.py"})


class Emulated(TorchDispatchMode):
    """Sends every operator of maskdm_fast that has a CUDA kernel to that kernel, emulated on CPU tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "maskdm_fast":
            func = getattr(torch.ops.maskdm_fast_emulated, func._opname).default
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def operators():
    """``torch.ops.maskdm_fast_emulated``."""
    torch.ops.load_library(LIBRARY)
    return torch.ops.maskdm_fast_emulated


@pytest.fixture
def emulated(operators):
    """Runs the ops' backend "cpu" on the emulated CUDA kernels."""
    operators.set_order(0, 0)
    with testing.poisoned_memory(), Emulated():
        yield operators


@pytest.fixture
def in_every_order(emulated):
    """``in_every_order(run)``: what run() returns, after comparing it bit for bit between the orders of blocks and
    threads."""

    def run_all(run):
        results = []
        for order in (0, 1, 2):
            emulated.set_order(order, 5)
            results.append(run())
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())
        return results[0]

    return run_all
