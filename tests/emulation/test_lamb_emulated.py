"""The CUDA kernels of lamb_ema, emulated, where the parity cases do not go.

Sizes that take several blocks or launches, addresses off the boundaries of wide accesses, values that are not finite.
"""

import pytest
import torch

from maskdm_fast import testing
from maskdm_fast.ops.lamb_ema import cases
from maskdm_fast.optim import LambEMA
from maskdm_fast.testing import draw

ALL = torch.float32, torch.float16, torch.bfloat16
SHAPES = tuple((1 + 3 * i % 11,) * (1 + i % 2) for i in range(60))


@pytest.mark.parametrize("copied", [None, "bfloat16"])
def test_more_tensors_than_a_launch_takes(emulated, copied):
    """Two launches of each kernel; tensors without a value in between, and some that are not adapted."""
    case = cases.Case("many", (*SHAPES, (0,), (201, 100), (0, 3)), copy=copied, min_ndim=2)
    inputs = cases.make_inputs(case, torch.float32, "cpu", seed=5)
    first = testing.check_parity(cases, inputs, "cpu")
    for order in (1, 2):
        emulated.set_order(order, 5)
        assert all(torch.equal(value, first[name]) for name, value in testing.run(cases, inputs, "cpu").items())


def test_a_tensor_of_more_chunks_than_the_threads_that_add_them(emulated):
    case = cases.Case("long", ((257 * 8192 + 3,),))
    testing.check_parity(cases, cases.make_inputs(case, torch.bfloat16, "cpu", seed=6), "cpu")


@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "copies"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_off_the_boundary(emulated, dtype, name):
    """One list of each tensor lies off the boundary, which `testing.run` would undo by cloning."""
    case = cases.Case("moved", ((7, 5), (9000,)), copy="float16")
    inputs = cases.make_inputs(case, dtype, "cpu", seed=6)
    want = testing.run(cases, inputs, "cpu")
    moved = []
    for tensor in inputs[name]:
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        moved.append(memory[1:].view(tensor.shape).copy_(tensor))
    assert all(tensor.data_ptr() % 16 != 0 for tensor in moved)
    for key, value in cases.call(inputs | {name: moved}, "cpu").items():
        # Squares are added in another order: the ratio may differ in its last digit.
        torch.testing.assert_close(value, want[key], msg=lambda text, key=key: f"{key}: {text}")


def test_a_step_that_overflowed_changes_nothing(emulated):
    params = [draw(shape, torch.float32, "cpu", seed=i).requires_grad_() for i, shape in enumerate([(5, 3), (9000,)])]
    optimizer = LambEMA(params, lr=0.1, max_grad_norm=0.5, capturable=True)
    for overflows in (True, False, True):
        for param in params:
            param.grad = torch.full_like(param, 8.0)
        if overflows:
            params[0].grad[1, 2] = float("nan")
        before = [value.clone() for value in (*params, *optimizer.ema_parameters())]
        optimizer.step(loss_scale=torch.tensor(8.0))
        after = (*params, *optimizer.ema_parameters())
        assert all(torch.equal(*pair) == overflows for pair in zip(before, after, strict=True))


def test_a_nan_is_not_hidden(emulated):
    """It spoils the norm, and so all of its tensor, but no other."""
    inputs = cases.make_inputs(cases.Case("nan", ((9000,), (7,))), torch.float32, "cpu", seed=7)
    inputs["grads"][0][8999] = float("nan")
    cases.call(inputs, "cpu")
    assert inputs["params"][0].isnan().all() and inputs["params"][1].isfinite().all()


def test_float64_is_refused(emulated):
    inputs = cases.make_inputs(cases.CASES[0], torch.float64, "cpu", seed=1)
    with pytest.raises(RuntimeError, match=r"lamb_ema: the CUDA kernel has no float64, the dtype of params\[0\]"):
        cases.call(inputs, "cpu")
