"""The same tasks as `python -m benchmarks.ops`, for pytest-benchmark: ``pytest benchmarks --benchmark-only``.

It keeps histories, compares runs (``--benchmark-compare``) and plots. It measures one function after the other, though,
so ratios come from `benchmarks.ops`, where they take turns.
"""

import pytest

from benchmarks import harness, peers

_CASES = [(op, case) for op in peers.BUILDERS for case in peers.benchmark_cases(op)]
_TASKS = [(op, case, index) for op, case in _CASES for index in range(2 if op == "gather_tokens" else 1)]


@pytest.fixture(scope="module", params=_TASKS, ids=lambda task: f"{task[0]}-{task[1].name}-{task[2]}")
def task(request):
    op, case, index = request.param
    return list(peers.BUILDERS[op](case))[index]


@pytest.mark.parametrize("kind", ["ours", "eager", "compiled"])
def test_op(benchmark, task, kind):
    functions = {"ours": [task.ours], "eager": list(task.peers.values())}.get(kind)
    if functions is None:
        functions = [task.compiled(name) for name in task.to_compile]
    benchmark.group = f"{task.op}: {task.case}"
    for function in functions:
        task.check_parity(function)
    best = min(functions, key=lambda function: harness.interleave({"once": lambda: task.run(function)}, 3)["once"])
    benchmark(task.run, best)
