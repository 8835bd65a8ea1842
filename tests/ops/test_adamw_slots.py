"""adamw_ema without the slots that nobody wants: no first moment where beta1 is 0, no average."""

import pytest
import torch

from maskdm_fast import ops, testing
from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema import cases

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STEPS = 3


def _inputs(dtype, **changes):
    case = cases.Case("slots", ((33, 5), (70_001,)), copy="bfloat16", first_moment=False, **changes)
    return cases.make_inputs(case, dtype, "cpu", seed=1)


def _after_steps(inputs, name):
    for _ in range(STEPS):
        results = testing.run(cases, inputs, name)
        inputs = inputs | {
            kind: None if inputs[kind] is None else [results[f"{kind}[{i}]"] for i in range(len(inputs[kind]))]
            for kind in ("params", "exp_avgs", "exp_avg_sqs", "emas")
        }
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_memory", [False, True], ids=["numbers", "in_memory"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_slot_that_is_not_there_changes_no_bit(name, in_memory, dtype):
    """With a first moment of any values, for beta1 = 0 forgets it in the first step."""
    inputs = _inputs(dtype, in_memory=in_memory)
    moments = [testing.draw(tuple(v.shape), v.dtype, "cpu", seed=9) for v in inputs["exp_avg_sqs"]]
    whole = _after_steps(inputs | {"exp_avgs": moments}, name)
    for lacking in (inputs, inputs | {"emas": None, "ema_decay": None}):
        results = _after_steps(lacking, name)
        assert results.keys() == {
            key for key in whole if not key.startswith("exp_avgs" if lacking["emas"] else ("exp_avgs", "emas"))
        }
        for key, value in results.items():
            assert torch.equal(value, whole[key]), key


def test_a_number_for_the_average_is_not_used():
    inputs = _inputs(torch.float32) | {"emas": None}
    want = testing.run(cases, inputs | {"ema_decay": None}, "cpu")
    for unused in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        for key, value in testing.run(cases, inputs | {"ema_decay": unused}, "cpu").items():
            assert torch.equal(value, want[key]), key


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"betas": (0.5, 0.9)}, ValueError, r"adamw_ema: betas\[0\] is 0.5, want 0 where exp_avgs is None"),
        ({"exp_avgs": []}, ValueError, "adamw_ema: exp_avgs has 0 tensors, want 2"),
        ({"emas": []}, ValueError, "adamw_ema: emas has 0 tensors, want 2"),
        ({"ema_decay": None}, ValueError, "adamw_ema: ema_decay is None, want a number for the emas"),
        ({"exp_avg_sqs": None}, TypeError, "adamw_ema: exp_avg_sqs is None, want a list of tensors"),
    ],
)
def test_what_cannot_lack(name, changes, error, message):
    with pytest.raises(error, match=message):
        ops.adamw_ema(**_inputs(torch.float32) | changes, backend=name)


@pytest.mark.parametrize("slot", ["exp_avgs", "emas"])
def test_lamb_needs_all_of_them(slot):
    """The norm of its update takes the first moment a second time."""
    inputs = _inputs(torch.float32) | {"exp_avgs": _inputs(torch.float32)["exp_avg_sqs"]} | {slot: None}
    with pytest.raises(TypeError, match=f"lamb_ema: {slot} is None, want a list of tensors"):
        ops.lamb_ema(**inputs)


@pytest.mark.skipif(not backend.has_native(), reason="the native library is not built")
def test_the_operator_itself_refuses_a_beta1_without_its_moment():
    """Called past the checks in Python, as compiled code does."""
    p, g, v = ([torch.ones(3)] for _ in range(3))
    with pytest.raises(RuntimeError, match=r"adamw_ema: beta1 is 0\.5, want 0 where there are no exp_avgs"):
        torch.ops.maskdm_fast.adamw_ema_(p, g, [], v, [], [], None, 0.1, 0.5, 0.9, 1e-8, 0.0, 1, 0.9)
    with pytest.raises(RuntimeError, match="lamb_ema: emas has 0 tensors, want 1"):
        torch.ops.maskdm_fast.lamb_ema_(p, g, v, v, [], [], None, 0.1, 0.0, 0.9, 1e-8, 0.0, 1, 0.9, 0)
