"""Every backend of every op against the float64 reference, forward and backward, by the one tolerance rule."""

import importlib
import random

import pytest
import torch

from maskdm_fast import ops, testing

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = {op: importlib.import_module(f"maskdm_fast.ops.{op}.cases") for op in ops.IMPLEMENTATIONS}
ALL = [pytest.param(CASES[op], case, id=f"{op}-{case.name}") for op in CASES for case in CASES[op].CASES]
NUM_SWEEPS = 60


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("cases", "case"), ALL)
def test_cpu_matches_reference(cases, case, dtype):
    testing.check_parity(cases, cases.make_inputs(case, dtype, "cpu", seed=0), "cpu")


@pytest.mark.parametrize("grad_layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].WITH_GRAD])
def test_upstream_gradient_of_any_layout(op, grad_layout):
    cases = CASES[op]
    for case in cases.CASES:
        testing.check_parity(cases, cases.make_inputs(case, torch.float32, "cpu", seed=1), "cpu", grad_layout)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", CASES)
def test_one_input_of_another_layout(op, layout):
    """Regression: linear read a bias, and gather_tokens cu_seqlens, as if they were contiguous."""
    cases = CASES[op]
    for case in cases.CASES:
        for name, inputs in testing.restride_one(cases.make_inputs(case, torch.float32, "cpu", seed=0), layout):
            print(f"{case.name}: {name}")  # shown when the test fails
            testing.check_parity(cases, inputs, "cpu")


@pytest.mark.parametrize("op", CASES)
def test_random_shapes(op):
    cases = CASES[op]
    for seed in range(NUM_SWEEPS):
        rng = random.Random(seed)
        case, dtype = cases.random_case(rng), rng.choice(DTYPES)
        print(f"seed {seed}: {case} {dtype}")  # shown when the test fails
        testing.check_parity(cases, cases.make_inputs(case, dtype, "cpu", seed), "cpu")


@pytest.mark.parametrize("op", CASES)
def test_repeats_bit_for_bit_on_any_number_of_threads(op):
    cases = CASES[op]
    threads = torch.get_num_threads()
    try:
        for case in cases.CASES:
            inputs = cases.make_inputs(case, torch.float32, "cpu", seed=2)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(testing.run(cases, inputs, "cpu"))
            for name, first in results[0].items():
                assert all(torch.equal(first, other[name]) for other in results[1:]), f"{case.name}: {name}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].WITH_GRAD])
def test_gradcheck(op, backend):
    cases = CASES[op]
    for case in cases.CASES:
        inputs = cases.make_inputs(case, torch.float64, "cpu", seed=3)
        names = [name for name in cases.WITH_GRAD if inputs[name] is not None]
        if sum(inputs[name].numel() for name in names) > 1200:
            continue  # numerical differentiation runs the op twice per value
        if inputs.get("weighting", "none").startswith("l1"):
            continue  # sid_loss takes its normaliser for a constant; test_sid_loss.py has autograd's gradients

        def function(*values, inputs=inputs, names=names):
            return tuple(cases.call(inputs | dict(zip(names, values, strict=True)), backend).values())

        leaves = [inputs[name].detach().clone().requires_grad_() for name in names]
        assert torch.autograd.gradcheck(function, leaves), case.name


def test_a_nan_is_never_hidden():
    """NaN in an input reaches the result: training relies on it to notice that a run has diverged."""
    qkv = torch.zeros(1, 20, 3, 1, 16)
    for which in range(3):
        bad = qkv.clone()
        bad[0, 7, which, 0, 3] = float("nan")
        out = ops.masked_attention(bad, backend="cpu")
        assert out.isnan().any(), which
    for kind in ("mse", "l1", "huber"):
        pred = torch.zeros(2, 3, 5)
        pred[1, 2, 4] = float("nan")
        assert ops.masked_dsm_loss(pred, torch.zeros_like(pred), kind=kind, backend="cpu").isnan()
