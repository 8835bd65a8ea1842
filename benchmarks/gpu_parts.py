"""What `benchmarks.gpu_report` measures: ``python -m benchmarks.gpu_parts PART`` prints each result as a line of JSON.

Every result is guarded: one that fails becomes a line with its error, and the next is tried.
"""

import dataclasses
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks import gpu_peers, harness, peers
from benchmarks.device_step import DeviceStep
from benchmarks.step import Case, Contest
from benchmarks.tasks import Place, Task
from maskdm_fast import ops, testing
from maskdm_fast.ops import backend
from maskdm_fast.train.costs import model_flops
from maskdm_fast.train.hardware import stated_peak

Row = dict[str, Any]
REPEATS = 7
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OURS = ("cuda", "triton", "reference")
STEPS = (Case("small64", 0.9, 1024), Case("small64", 0.0, 256), Case("base256", 0.9, 32))
LENGTHS = (27, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512)
_TOKENS = 2**17  # of a batch of the crossover: enough to fill the largest GPU
NUM_SWEEPS = 20


def _guarded(labels: Mapping[str, Any], function: Callable[[], Mapping[str, Any]]) -> Row:
    """`labels` with what `function` returns, or with the error that it raises."""
    try:
        return {**labels, **function()}
    except Exception as error:
        return {**labels, "error": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _usable(op: str, device: str) -> list[str]:
    """The backends of the op that run on the device, ours first."""
    names = (*(("cpu",) if device == "cpu" else ()), *OURS, "sdpa", "xformers")
    found = [name for name in names if name in ops.IMPLEMENTATIONS[op]]
    return [name for name in found if backend.why_not(name, device, torch.float32) is None]


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """What replays `function` from a CUDA graph: its kernels without the host that launches them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _attempts(actions: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each action returns, and the errors of those that fail, by name: one takes nothing along."""
    results, errors = {}, {}
    for name, action in actions.items():
        try:
            results[name] = action()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    return results, errors


def _times(functions: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, Any]:
    """``{ms, graph_ms, errors}`` by name: called as it is, and replayed from a graph, where that can be.

    A contestant that fails is left out, with its error.
    """
    _, errors = _attempts(functions)
    able = {name: function for name, function in functions.items() if name not in errors}
    milliseconds = harness.interleave(able, repeats, device=device)
    replays, not_captured = {}, {}
    if device == "cuda":
        replays, not_captured = _attempts({name: partial(graphed, function) for name, function in able.items()})
    errors |= {f"{name}, in a graph": error for name, error in not_captured.items()}
    graph = harness.interleave(replays, repeats, device=device) if replays else {}
    return {
        "ms": {name: round(time, 5) for name, time in milliseconds.items()},
        "graph_ms": {name: round(time, 5) for name, time in graph.items()},
        "errors": errors,
    }


def parity(device: str) -> Iterator[Row]:
    """Every case of every op, and random ones, on every backend and dtype against the float64 reference."""
    for op in ops.IMPLEMENTATIONS:
        cases = importlib.import_module(f"maskdm_fast.ops.{op}.cases")
        for name in _usable(op, device):
            # xformers multiplies float32 in TF32.
            for dtype in DTYPES[name == "xformers" :]:
                labels = {"op": op, "backend": name, "dtype": _name(dtype)}
                yield _guarded(labels, partial(_check, cases, name, dtype, device))


def _check(cases: Any, name: str, dtype: torch.dtype, device: str) -> Row:
    rngs = [random.Random(seed) for seed in range(NUM_SWEEPS)]
    chosen = [*cases.CASES, *(cases.random_case(rng) for rng in rngs)]
    failures = []
    with testing.poisoned_memory():
        for case in chosen:
            try:
                testing.check_parity(cases, cases.make_inputs(case, dtype, device, seed=0), name)
            except Exception as error:
                failures.append(f"{case}: {type(error).__name__}: {error}"[:300])
    return {"cases": len(chosen), "failures": failures}


def larger(op: str, case: Any) -> Any:
    """A case of `benchmarks.ops` with 16 times the images, as a GPU wants them; attention to the same number of
    tokens."""
    if op in ("noise_visible_patches", "gather_tokens"):
        return dataclasses.replace(case, num_images=16 * case.num_images)
    if op in ("masked_attention", "masked_dsm_loss"):
        return dataclasses.replace(case, lengths=case.lengths * 16)
    if op == "linear":
        return dataclasses.replace(case, rows=(16 * case.rows[0], *case.rows[1:]))
    return dataclasses.replace(case, shape=(16 * case.shape[0], *case.shape[1:])) if op == "gelu" else case


def op_times(device: str) -> Iterator[Row]:
    """Forward and backward of every op on each of its backends, beside PyTorch's ways and other libraries'.

    ``gb_per_s`` and ``tflop_per_s`` are the least that the op has to move and to compute, by its `cost.py`, over the
    time of the graph where there is one. What moves less than the cache holds may be faster than memory.
    """
    for op, build in peers.BUILDERS.items():
        for case in peers.benchmark_cases(op):
            for dtype in (torch.float32,) if op in ("adamw_ema", "lamb_ema") else (torch.bfloat16, torch.float32):
                labels = {"op": op, "case": case.name, "dtype": _name(dtype)}
                place = Place(device, dtype)
                found = list(_tasks(partial(build, larger(op, case) if device == "cuda" else case, place), labels))
                while found:  # the inputs of one task at a time in memory, once it is measured
                    task = found.pop(0)
                    if isinstance(task, dict):
                        yield task
                    else:
                        yield _guarded({**labels, "op": task.op}, partial(_op_row, task, op, device, dtype))


def _tasks(build: Callable[[], Iterator[Task]], labels: Row) -> Iterator[Task | Row]:
    try:
        yield from build()
    except Exception as error:
        yield {**labels, "error": f"{type(error).__name__}: {error}"[:2000]}


def _op_row(task: Task, op: str, device: str, dtype: torch.dtype) -> Row:
    own = [name for name in _usable(op, device) if name not in gpu_peers.LIBRARIES]
    contestants = {name: task.ours_on(name) for name in own} | task.peers
    contestants |= gpu_peers.of(task, dtype) if device == "cuda" else {}
    for name in task.to_compile:
        contestants[f"compiled {name}"] = task.compiled(name)
    _, errors = _attempts({name: partial(task.check_parity, function) for name, function in contestants.items()})
    agreeing = {name: partial(task.run, function) for name, function in contestants.items() if name not in errors}
    found = _times(agreeing, device, REPEATS)
    best = found["ms"] | found["graph_ms"]
    rates = {
        "bytes": task.work.bytes,
        "flops": task.work.flops,
        "gb_per_s": {name: round(task.work.bytes / time * 1e-6, 1) for name, time in best.items()},
        "tflop_per_s": {name: round(task.work.flops / time * 1e-9, 2) for name, time in best.items()},
    }
    return {**found, "errors": errors | found["errors"], **rates}


def train_step(device: str) -> Iterator[Row]:
    """Images per second and MFU of whole train steps, under bfloat16 autocast: eager, captured, and plain PyTorch."""
    for case in STEPS:
        yield _guarded(dataclasses.asdict(case), partial(_step_row, case, device))


def _step_row(case: Case, device: str) -> Row:
    contest = Contest(case, device=device, precision="bf16")
    functions = contest.functions()
    step = DeviceStep(case.model, case.mask, case.batch, device, "bf16")
    functions["device step"] = step
    _, errors = _attempts(functions)
    able = {name: function for name, function in functions.items() if name not in errors}
    if device == "cuda":
        captured, not_captured = _attempts({"captured": step.capture})
        able, errors = able | captured, errors | not_captured
    milliseconds = harness.interleave(able, REPEATS, device=device)
    flops = model_flops(case.model, [(case.num_visible, 1.0)]) * case.batch
    peak = stated_peak(torch.device(device), "bf16")
    return {
        "ms": {name: round(time, 4) for name, time in milliseconds.items()},
        "images_per_s": {name: round(case.batch / time * 1e3, 1) for name, time in milliseconds.items()},
        "tflop_per_s": {name: round(flops / time * 1e-9, 2) for name, time in milliseconds.items()},
        "mfu": {name: round(flops / time * 1e3 / peak, 4) for name, time in milliseconds.items()} if peak else None,
        "peak_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else None,
        "errors": errors,
    }


def crossover(device: str) -> Iterator[Row]:
    """Attention by length, forward and backward, ours and others'; at last what `crossover.LONGEST` should say.

    The last line holds, for each of our backends and for the faster of them, the longest sequence up to which it is no
    slower than the fastest of the others at every length tried, by the times in a graph; None: already at the shortest.
    """
    rows = []
    for length in LENGTHS:
        row = _guarded({"tokens": length}, partial(_attention_row, length, device))
        rows.append(row)
        yield row
    yield _guarded({"conclusion": "longest sequence on our own kernels"}, partial(_longest, rows))


def _attention_row(length: int, device: str) -> Row:
    base = peers.benchmark_cases("masked_attention")[0]
    num_images = max(1, (_TOKENS if device == "cuda" else 4 * length) // length)
    case = dataclasses.replace(base, name=f"{length} tokens", lengths=(length,) * num_images)
    (task,) = peers.masked_attention(case, Place(device, torch.bfloat16))
    task = dataclasses.replace(task, to_compile=())
    return {"images": num_images} | _op_row(task, "masked_attention", device, torch.bfloat16)


def _longest(rows: list[Row]) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for names in (("cuda",), ("triton",), ("cuda", "triton")):
        longest = None
        for row in rows:
            times = row.get("graph_ms") or row.get("ms") or {}
            ours = [time for name, time in times.items() if name in names]
            others = [time for name, time in times.items() if name not in (*OURS, "cpu")]
            if not ours or not others or min(ours) > min(others):
                break
            longest = row["tokens"]
        found[" or ".join(names)] = longest
    return found


PARTS: dict[str, Callable[[str], Iterator[Row]]] = {
    "parity": parity,
    "crossover": crossover,
    "train_step": train_step,
    "ops": op_times,
}


def main(arguments: list[str] | None = None) -> None:
    """Print the results of one part, on the first CUDA device."""
    (part,) = sys.argv[1:] if arguments is None else arguments
    with torch.cuda.device(0) if torch.cuda.is_available() else nullcontext():
        for row in PARTS[part]("cuda"):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
