"""The CUDA kernels of masked_dsm_loss and adamw_ema, emulated, where the parity cases do not go.

Sizes that take several blocks or launches, addresses off the boundaries of wide accesses, numbers in memory.
"""

import dataclasses

import pytest
import torch

from maskdm_fast import ops, testing
from maskdm_fast.ops.adamw_ema import cases as adam_cases
from maskdm_fast.ops.adamw_ema.op import global_norm
from maskdm_fast.ops.masked_dsm_loss import cases as loss_cases
from maskdm_fast.optim import AdamWEMA
from maskdm_fast.testing import draw

ALL = torch.float32, torch.float16, torch.bfloat16


def _off_boundary(tensor, values=1):
    """The same contiguous values at an address that is `values` elements past a boundary of 16 bytes."""
    memory = torch.empty(tensor.numel() + values, dtype=tensor.dtype)
    return memory[values:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("lengths", "width", "packed"),
    [
        ((410, 410), 49, False),  # ten blocks an image; the second one begins between two boundaries
        ((0, 1, 700, 0, 3, 90), 37, True),  # more blocks than the short images have chunks, fewer than the long one
    ],
    ids=["long", "uneven"],
)
def test_loss_of_images_over_several_blocks(in_every_order, lengths, width, packed, dtype):
    case = loss_cases.Case("blocks", lengths, width, kind="huber", packed=packed, reduction="none")
    inputs = loss_cases.make_inputs(case, dtype, "cpu", seed=3)

    def run():
        return testing.check_parity(loss_cases, inputs, "cpu")

    losses = in_every_order(run)["loss"]
    mean = testing.check_parity(loss_cases, inputs | {"reduction": "mean"}, "cpu")["loss"]
    torch.testing.assert_close(losses.mean(), mean)


@pytest.mark.parametrize("moved", ["pred", "target", "both"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_loss_off_the_boundary(emulated, dtype, moved):
    case = loss_cases.Case("moved", (9, 9, 9), 21)
    inputs = loss_cases.make_inputs(case, dtype, "cpu", seed=4)
    for name in ("pred", "target"):
        if moved in (name, "both"):
            inputs[name] = _off_boundary(inputs[name])
            assert inputs[name].data_ptr() % 16 != 0
    testing.check_parity(loss_cases, inputs, "cpu")


def test_a_nan_in_the_loss_is_not_hidden(emulated):
    for kind in ("mse", "l1", "huber"):
        pred = torch.zeros(2, 3, 5, requires_grad=True)
        with torch.no_grad():
            pred[1, 2, 4] = float("nan")
        loss = ops.masked_dsm_loss(pred, torch.zeros_like(pred), kind=kind, backend="cpu")
        loss.backward()
        assert loss.isnan() and pred.grad.isnan().sum() == 1 and pred.grad[1, 2, 4].isnan()


def test_the_sum_of_many_values_is_accurate(emulated):
    """300,000 equal values, in float32 one after another, would be off by a thousandth."""
    pred = torch.full((1, 300, 1000), 0.1)
    want = torch.tensor(0.1).double().square()
    loss = ops.masked_dsm_loss(pred, torch.zeros_like(pred), backend="cpu")
    assert abs(loss.double() / want - 1) < 1e-7


def test_wrong_segments_touch_nothing_outside(emulated):
    """On a GPU their values are not looked at beforehand; a release build keeps within the tensors."""
    pred = torch.ones(5, 7, requires_grad=True)
    for ends in ([0, 50, 5], [0, 4, 2], [-9, 3, 5], [7, 9, 11]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        loss = ops.masked_dsm_loss(pred, torch.zeros(5, 7), cu_seqlens=cu_seqlens, backend="cpu")
        loss.backward()
        assert loss.isfinite()


SHAPES = tuple((1 + 3 * i % 11,) for i in range(150))


@pytest.mark.parametrize("copied", [None, "bfloat16"])
def test_more_tensors_than_a_launch_takes(in_every_order, copied):
    """Three launches of the step and two of the norm; tensors without a value in between."""
    case = adam_cases.Case("many", (*SHAPES, (0,), (20_001,), (0,)), copy=copied)
    inputs = adam_cases.make_inputs(case, torch.float32, "cpu", seed=5)
    in_every_order(lambda: testing.check_parity(adam_cases, inputs, "cpu"))


@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "copies"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_step_off_the_boundary(emulated, dtype, name):
    """One list of each tensor lies off the boundary, which `testing.run` would undo by cloning."""
    case = adam_cases.Case("moved", ((7, 5), (9000,)), copy="float16")
    inputs = adam_cases.make_inputs(case, dtype, "cpu", seed=6)
    want = testing.run(adam_cases, inputs, "cpu")
    inputs[name] = [_off_boundary(tensor) for tensor in inputs[name]]
    assert all(tensor.data_ptr() % 16 != 0 for tensor in inputs[name])
    out = adam_cases.call(inputs, "cpu")
    norm, wanted_norm = out.pop("norm"), want.pop("norm")
    torch.testing.assert_close(norm, wanted_norm, rtol=1e-7, atol=0)  # added up in another order
    for key, value in out.items():
        assert torch.equal(value, want[key]), key


@pytest.mark.parametrize("moved", [None, "grads", "exp_avg_sqs"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_slots_that_are_not_there(emulated, dtype, moved):
    """Their addresses are null, which the sanitizer would tell of; the rest is the same bit for bit."""
    case = adam_cases.Case("slots", ((7, 5), (9001,)), copy="float16", first_moment=False)
    inputs = adam_cases.make_inputs(case, dtype, "cpu", seed=9)
    moments = [draw(tuple(v.shape), v.dtype, "cpu", seed=10) for v in inputs["exp_avg_sqs"]]
    want = testing.run(adam_cases, inputs | {"exp_avgs": moments}, "cpu")
    for lacking in ({}, {"emas": None}):
        copied = {
            name: [x.clone() for x in value] if isinstance(value, list) else value for name, value in inputs.items()
        }
        copied |= lacking
        if moved is not None:
            copied[moved] = [_off_boundary(tensor) for tensor in copied[moved]]
        out = adam_cases.call(copied, "cpu")
        norm, wanted_norm = out.pop("norm"), want["norm"]
        torch.testing.assert_close(norm, wanted_norm, rtol=1e-7, atol=0)
        assert {key.partition("[")[0] for key in out} >= {"params", "exp_avg_sqs", "copies"}
        for key, value in out.items():
            assert torch.equal(value, want[key]), key


def test_parameters_of_several_dtypes_in_one_call(emulated):
    together, alone = {}, {}
    for dtype in ALL:
        case = adam_cases.Case("mixed", ((40,), (3, 3)))
        inputs = adam_cases.make_inputs(case, dtype, "cpu", seed=7)
        alone |= {f"{dtype} {name}": value for name, value in testing.run(adam_cases, inputs, "cpu").items()}
        for name, value in inputs.items():
            together[name] = together.get(name, []) + value if isinstance(value, list) else value
    results = adam_cases.call(together, "cpu")
    for index, dtype in enumerate(ALL):
        for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
            for i in range(2):
                assert torch.equal(results[f"{name}[{2 * index + i}]"], alone[f"{dtype} {name}[{i}]"])


def test_norm_of_large_values_and_several_dtypes(emulated):
    assert torch.allclose(global_norm([torch.tensor([3e30, 4e30])], backend="cpu"), torch.tensor(5e30))
    mixed = [torch.full((3, 3), 2.0), torch.full((7,), 1.0, dtype=torch.bfloat16), torch.ones(5, 2).double().T]
    norm = global_norm(mixed, backend="cpu")
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx((36 + 7 + 10) ** 0.5)
    assert global_norm([torch.zeros(0)], backend="cpu") == 0.0


def test_float64_is_refused(emulated):
    pred = draw((2, 3, 4), torch.float64, "cpu", seed=1)
    with pytest.raises(RuntimeError, match="masked_dsm_loss: the CUDA kernels have no float64"):
        ops.masked_dsm_loss(pred, pred, backend="cpu")
    inputs = adam_cases.make_inputs(adam_cases.CASES[0], torch.float64, "cpu", seed=1)
    with pytest.raises(RuntimeError, match=r"adamw_ema: the CUDA kernel has no float64, the dtype of params\[0\]"):
        adam_cases.call(inputs, "cpu")


def test_wrong_lists_are_refused(emulated):
    inputs = adam_cases.make_inputs(adam_cases.CASES[0], torch.float32, "cpu", seed=1)
    with pytest.raises(ValueError, match=r"emas\[1\] has shape \[2\], want \[7\]"):
        adam_cases.call(inputs | {"emas": [inputs["emas"][0], torch.zeros(2), inputs["emas"][2]]}, "cpu")


def test_numbers_in_memory_are_read_when_the_kernel_runs(emulated):
    """Float and tensor give the same, also far from the first step, where 1 - beta^step has no digits to lose."""
    for step in (1, 2, 1000, 10_000_000):
        case = adam_cases.Case("numbers", ((50,),), step=step)
        numbers = adam_cases.make_inputs(case, torch.float32, "cpu", seed=8)
        tensors = adam_cases.make_inputs(dataclasses.replace(case, in_memory=True), torch.float32, "cpu", seed=8)
        want, out = (testing.run(adam_cases, inputs, "cpu") for inputs in (numbers, tensors))
        for name, value in want.items():
            torch.testing.assert_close(out[name], value, rtol=2e-6, atol=1e-7)


def test_a_step_that_overflowed_changes_nothing(emulated):
    params = [draw(shape, torch.float32, "cpu", seed=i).requires_grad_() for i, shape in enumerate([(5, 3), (9000,)])]
    optimizer = AdamWEMA(params, lr=0.1, max_grad_norm=0.5, capturable=True)
    for overflows in (True, False, True):
        for param in params:
            param.grad = torch.full_like(param, 8.0)
        if overflows:
            params[0].grad[1, 2] = float("nan")
        before = [value.clone() for value in (*params, *optimizer.ema_parameters())]
        optimizer.step(loss_scale=torch.tensor(8.0))
        after = (*params, *optimizer.ema_parameters())
        assert all(torch.equal(*pair) == overflows for pair in zip(before, after, strict=True))
    assert all(int(optimizer.state[param]["step"]) == 1 for param in params)


def test_capturable_optimizer(emulated):
    """Five steps of both kinds of optimizer on the kernels, with a learning rate that changes in place."""
    values = {}
    for capturable in (False, True):
        params = [draw(shape, torch.float32, "cpu", seed=i).requires_grad_() for i, shape in enumerate([(5, 3), (4,)])]
        optimizer = AdamWEMA(params, lr=0.1, max_grad_norm=0.5, capturable=capturable)
        for step in range(1, 6):
            for i, param in enumerate(params):
                param.grad = draw(tuple(param.shape), torch.float32, "cpu", seed=100 * step + i)
            optimizer.step()
            if capturable:
                optimizer.param_groups[0]["lr"].mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        values[capturable] = [*params, *optimizer.ema_parameters()]
    for out, want in zip(values[True], values[False], strict=True):
        torch.testing.assert_close(out.detach(), want.detach(), rtol=1e-5, atol=1e-6)
