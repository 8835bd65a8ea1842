"""Every op on the device, on each of its backends, against the float64 reference and against itself."""

import importlib
import random

import pytest
import torch

from maskdm_fast import ops, testing
from maskdm_fast.ops import backend

CASES = {op: importlib.import_module(f"maskdm_fast.ops.{op}.cases") for op in ops.IMPLEMENTATIONS}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_SWEEPS = 60
# The CPU's backends are tested elsewhere; here they run a few cases, as proof that the tests themselves are right.
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "sdpa", "xformers")}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with testing.poisoned_memory():
        yield


def _backends(op, device):
    """Backends of the op that run on the device; the reason for each that does not is in `maskdm-fast info`."""
    usable = [
        name
        for name in BACKENDS[device]
        if name in ops.IMPLEMENTATIONS[op] and backend.why_not(name, device, torch.float32) is None
    ]
    if not usable:
        pytest.skip(f"no backend of {op} runs on {device}")
    return usable


def _cases(op, device):
    return CASES[op].CASES if device == "cuda" else CASES[op].CASES[:2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", CASES)
def test_matches_the_reference(op, dtype, device):
    cases = CASES[op]
    for name in _backends(op, device):
        if name == "xformers" and dtype == torch.float32:
            continue  # multiplies in TF32
        for case in _cases(op, device):
            print(name, case)  # shown when the test fails
            testing.check_parity(cases, cases.make_inputs(case, dtype, device, seed=0), name)


@pytest.mark.parametrize("grad_layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].WITH_GRAD])
def test_upstream_gradient_of_any_layout(op, grad_layout, device):
    cases = CASES[op]
    for name in _backends(op, device):
        for case in _cases(op, device):
            print(name, case)
            testing.check_parity(cases, cases.make_inputs(case, torch.float16, device, seed=1), name, grad_layout)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", CASES)
def test_one_input_of_another_layout(op, layout, device):
    cases = CASES[op]
    for name in _backends(op, device):
        for case in _cases(op, device):
            made = cases.make_inputs(case, torch.float16, device, seed=3)
            for argument, inputs in testing.restride_one(made, layout):
                print(name, case, argument)
                testing.check_parity(cases, inputs, name)


@pytest.mark.parametrize("op", CASES)
def test_random_shapes(op, device):
    cases = CASES[op]
    for seed in range(NUM_SWEEPS if device == "cuda" else 3):
        rng = random.Random(seed)
        case, dtype = cases.random_case(rng), rng.choice(DTYPES)
        for name in _backends(op, device):
            if (name, dtype) == ("xformers", torch.float32):
                continue
            print(f"seed {seed}: {name} {case} {dtype}")
            testing.check_parity(cases, cases.make_inputs(case, dtype, device, seed), name)


@pytest.mark.parametrize("op", CASES)
def test_measured_shapes(op, cuda):
    """The shapes that benchmarks measure are hundreds of times as large as the cases: offsets, grids, several waves."""
    cases = CASES[op]
    for name in _backends(op, cuda):
        for case in cases.BENCHMARKS:
            print(name, case)
            testing.check_parity(cases, cases.make_inputs(case, torch.bfloat16, cuda, seed=5), name)


@pytest.mark.parametrize("op", CASES)
def test_repeats_bit_for_bit(op, device):
    """Our own kernels add in one order, whatever order blocks run in."""
    cases = CASES[op]
    for name in set(_backends(op, device)) - {"sdpa", "xformers"}:
        for case in (*_cases(op, device), *(cases.BENCHMARKS[:1] if device == "cuda" else ())):
            inputs = cases.make_inputs(case, torch.bfloat16, device, seed=2)
            first, *others = (testing.run(cases, inputs, name) for _ in range(4))
            for key, value in first.items():
                assert all(torch.equal(value, other[key]) for other in others), f"{name}, {case.name}: {key}"


def _run(cases, inputs, name, upstream):
    """As `testing.run`, without copies from the host: the upstream gradients are kept in `upstream` from the first."""
    leaves = {key: inputs[key].detach().requires_grad_() for key in cases.WITH_GRAD if inputs.get(key) is not None}
    fresh = {key: [x.clone() for x in value] if isinstance(value, list) else value for key, value in inputs.items()}
    outputs = cases.call(fresh | leaves, name)
    results = {key: output.detach() for key, output in outputs.items()}
    if leaves:
        for index, (key, value) in enumerate(results.items()):
            if key not in upstream:
                upstream[key] = testing.draw(tuple(value.shape), value.dtype, value.device, seed=1000 + index)
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [upstream[key] for key in outputs])
        results |= {f"grad_{key}": grad for key, grad in zip(leaves, grads, strict=True)}
    return results


def _captured(function):
    """`function` recorded in a graph, after one call as it is; returns the replay, which gives the recorded results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = function()

    def replay():
        graph.replay()
        return recorded

    return replay


@pytest.mark.parametrize("op", CASES)
def test_a_replayed_graph_reads_its_inputs_anew(op, device):
    """Forward and backward on new values in the same memory: nothing was read on the host while it was recorded."""
    cases = CASES[op]
    for name in set(_backends(op, device)) - {"sdpa", "xformers"}:
        for case in _cases(op, device):
            inputs, upstream = cases.make_inputs(case, torch.float16, device, seed=6), {}

            def function(inputs=inputs, name=name, upstream=upstream):
                return _run(cases, inputs, name, upstream)

            replay = _captured(function) if device == "cuda" else function
            replay()
            _refill(inputs, cases.make_inputs(case, torch.float16, device, seed=7))
            recorded, wanted = replay(), function()
            for key, value in wanted.items():
                assert torch.equal(recorded[key], value), f"{name}, {case.name}: {key}"


def _refill(inputs, others):
    """New values in the same floating-point tensors; indices and bounds stay, which other values would not suit."""
    for key, value in inputs.items():
        pair = (value, others[key]) if isinstance(value, list) else ([value], [others[key]])
        for old, new in zip(*pair, strict=True):
            if isinstance(old, torch.Tensor) and old.is_floating_point() and not _overlaps(old):
                old.copy_(new)


def _overlaps(tensor):
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
