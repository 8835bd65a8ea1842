"""What every benchmark shares: interleaved timing, and the record of where it ran."""

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import maskdm_fast
from maskdm_fast.ops import backend

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _sample_on_cpu(function: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) * 1e3 / calls


def _sample_on_cuda(function: Callable[[], object], calls: int) -> float:
    """Between two events of the device: what it took, or the host to launch it, whichever is longer."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def interleave(
    contestants: Mapping[str, Callable[[], object]], repeats: int, *, shortest_ms: float = 1.0, device: str = "cpu"
) -> dict[str, float]:
    """Median time of one call of each contestant, in milliseconds.

    The contestants take turns, so that a drift of the clock or a busy neighbour meets all of them; the first of each
    round changes. A sample repeats fast calls until it lasts `shortest_ms`. Garbage collection is off.

    Args:
        contestants: functions by name.
        repeats: samples of each.
        shortest_ms: least duration of a sample.
        device: "cpu" or "cuda", where their work is done.
    """
    sample_ms = _sample_on_cuda if device == "cuda" else _sample_on_cpu

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls = {}
        for name, function in contestants.items():
            for _ in range(2):
                function()
            once = min(sample_ms(function, 1) for _ in range(2))
            calls[name] = max(1, round(shortest_ms / max(once, 1e-4)))
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        names = list(contestants)
        for turn in range(repeats):
            for offset in range(len(names)):
                name = names[(turn + offset) % len(names)]
                samples[name].append(sample_ms(contestants[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


def keep_freed_memory() -> bool:
    """Make malloc reuse freed memory instead of giving it back to the system; whether it could be asked to (glibc).

    It gives back large blocks, or keeps them, by what happened to be freed before. Fresh pages cost more than most ops,
    so the same function would take one of two times, for reasons that lie in its neighbours.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def copy_gb_per_s(mib: int = 256, repeats: int = 7) -> float:
    """Bandwidth of a copy too large for any cache, counting each byte once read and once written."""
    source = torch.ones(mib * 2**20 // 4)
    target = torch.zeros_like(source)
    milliseconds = interleave({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.nbytes / milliseconds * 1e-6


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, with -dirty if its code differs from it; None outside a repository."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    if not commit:
        return None
    # Results and pages are what benchmarks write.
    written = [":(exclude)benchmarks/results", ":(exclude)*.md", ":(exclude)docs"]
    changed = git(["git", "diff", "--quiet", "HEAD", "--", ".", *written]).returncode != 0
    return commit + "-dirty" * changed


def short_commit(commit: str | None) -> str:
    """A commit as tables show it, with -dirty if it has that."""
    number, *dirty = str(commit).split("-")
    return "-".join([number[:9], *dirty])


def environment() -> dict[str, Any]:
    """``machine``, ``versions``, ``commit`` and ``command`` of this process."""
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": backend.native_info().get("isa"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        machine["load_average"] = round(os.getloadavg()[0], 2)
    return {
        "machine": machine,
        "versions": {
            "maskdm_fast": maskdm_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
    }


def machine_slug(machine: Mapping[str, Any]) -> str:
    """A file name for the kind of machine, e.g. ``amd-epyc-2c-x86-64-v4``."""
    words = f"{machine['cpu']} {machine['cores']}c {machine['isa'] or 'reference'}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def save(result: Mapping[str, Any], name: str) -> Path:
    """Write ``benchmarks/results/<name>-<machine>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{machine_slug(result['machine'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def command_line(name: str, description: str, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; `prepare` reads and obeys them."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--save", action="store_true", help=f"also write benchmarks/results/{name}-<machine>.json")
    parser.add_argument("--repeats", type=int, default=repeats, help="samples of each function (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    return parser


def prepare(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse, and set the process up for measuring."""
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    # Inductor looks for a CUDA toolkit and warns where there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return options


def refuse_to_save_a_part(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """An error where ``--save`` comes with one of these options: what it leaves out would be lost from the result."""
    given = [name for name in names if getattr(options, name) != parser.get_default(name)]
    if options.save and given:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"--save is for the whole benchmark; leave {words} out")
