"""Measure every op, forward and backward, against plain PyTorch, eager and compiled: ``python -m benchmarks.ops``.

Every row is measured in one process: after a check that all functions agree, they take turns, and medians are reported.
The peers are in `benchmarks.peers`; of several eager or compiled ways the fastest counts.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.tasks import Task


def measure(task: Task, *, repeats: int, compile_peers: bool = True) -> dict[str, Any]:
    """One row: check that every function gives the same, then time them in turns.

    Args:
        task: the job.
        repeats: samples of each function.
        compile_peers: also measure the peers under torch.compile; each takes up to ten seconds to compile.

    Returns:
        ``{op, case, dtype, ms: {ours, eager, compiled}, gb_per_s, best: {eager, compiled}}``; compiled is None where
        nothing was compiled. gb_per_s is the least traffic of the op over our time, `best` names the fastest peers.

    Raises:
        AssertionError: a peer computes something else.
    """
    functions = {("ours", "ours"): task.ours} | {("eager", name): peer for name, peer in task.peers.items()}
    if compile_peers:
        torch._dynamo.reset()
        functions |= {("compiled", name): task.compiled(name) for name in task.to_compile}
    for function in functions.values():
        task.check_parity(function)
    times = harness.interleave({key: partial(task.run, function) for key, function in functions.items()}, repeats)
    milliseconds: dict[str, float | None] = {}
    best: dict[str, str | None] = {}
    for kind in ("ours", "eager", "compiled"):
        of_kind = {name: time for (its_kind, name), time in times.items() if its_kind == kind}
        best[kind] = min(of_kind, key=of_kind.__getitem__) if of_kind else None
        milliseconds[kind] = round(of_kind[best[kind]], 5) if of_kind else None
    del best["ours"]
    return {
        "op": task.op,
        "case": task.case,
        "dtype": "float32",
        "ms": milliseconds,
        "gb_per_s": round(task.work.bytes / times["ours", "ours"] * 1e-6, 2),
        "best": best,
    }


def overhead_us(task: Task, *, repeats: int) -> dict[str, Any]:
    """Microseconds of one call on inputs without an element: ``{op, ours, eager}``."""
    functions = {"ours": task.ours} | task.peers
    times = harness.interleave({name: partial(task.run, function) for name, function in functions.items()}, repeats)
    ours = times.pop("ours")
    return {"op": task.op, "ours": round(ours * 1e3, 2), "eager": round(min(times.values()) * 1e3, 2)}


def tasks(names: list[str], *, empty: bool = False) -> Iterator[Task]:
    """The tasks of the ops `names`, made one at a time, as the largest takes gigabytes."""
    for name in names:
        for case in (peers.empty_case(name),) if empty else peers.benchmark_cases(name):
            yield from peers.BUILDERS[name](case)


def report(names: list[str], *, repeats: int, compile_peers: bool = True) -> dict[str, Any]:
    """All rows of the ops `names`, with machine, versions, commit and command."""
    result = harness.environment()
    copy_gb_per_s = round(harness.copy_gb_per_s(), 2)
    result["rows"] = []
    for task in tasks(names):
        row = measure(task, repeats=repeats, compile_peers=compile_peers)
        result["rows"].append(row | {"copy_gb_per_s": copy_gb_per_s})
        print(_line(row), file=sys.stderr, flush=True)
    result["overhead_us"] = [overhead_us(task, repeats=repeats) for task in tasks(names, empty=True)]
    return result


def _cells(values: tuple[float | None, ...], digits: int) -> str:
    return "".join(f"{value:10.{digits}f}" if value is not None else f"{'-':>10}" for value in values)


def _line(row: dict[str, Any]) -> str:
    times = row["ms"]
    ratios = tuple(times[kind] / times["ours"] if times[kind] else None for kind in ("eager", "compiled"))
    cells = _cells(tuple(times.values()), 3) + _cells(ratios, 2) + _cells((row["gb_per_s"],), 1)
    return f"{row['op']:<22}{row['case']:<24}{cells}"


def table(result: dict[str, Any]) -> str:
    """`result` for people: one line per row, times in ms and how many times as long the peers take."""
    machine, versions = result["machine"], result["versions"]
    titles = ("ours ms", "eager ms", "compiled", "x eager", "x compiled", "GB/s")
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['isa']}; "
        f"torch {versions['torch']}, python {versions['python']}, maskdm_fast {versions['maskdm_fast']} "
        f"({result['commit']}); load {machine.get('load_average', 'unknown')}",
        result["command"],
        f"{'op':<22}{'case':<24}" + "".join(f"{title:>10}" for title in titles),
        *(_line(row) for row in result["rows"]),
    ]
    if result["rows"]:
        lines.append(f"large copy: {result['rows'][0]['copy_gb_per_s']} GB/s")
    lines += ["", "a call without work, microseconds", f"{'op':<22}{'ours':>10}{'eager':>10}"]
    lines += [f"{row['op']:<22}{_cells((row['ours'], row['eager']), 1)}" for row in result["overhead_us"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = harness.command_line("ops", __doc__, repeats=21)
    parser.add_argument(
        "--op", choices=list(peers.BUILDERS), help="only this op (gather_tokens includes scatter_tokens)"
    )
    options = harness.prepare(parser, arguments)
    harness.refuse_to_save_a_part(parser, options, "op")
    result = report([options.op] if options.op else list(peers.BUILDERS), repeats=options.repeats)
    if options.save:
        harness.save(result, "ops")
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
