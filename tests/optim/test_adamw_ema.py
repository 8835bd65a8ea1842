"""AdamWEMA against torch's AdamW with clipping and a separate EMA."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast import ops
from maskdm_fast.ops.adamw_ema.op import global_norm
from maskdm_fast.optim import AdamWEMA, ema_decay_at
from maskdm_fast.testing import draw

SHAPES = [(5, 3), (4,), (2, 2, 2)]


def _params(dtype=torch.float64):
    return [draw(shape, dtype, "cpu", seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def _set_grads(params, step):
    for i, param in enumerate(params):
        param.grad = draw(tuple(param.shape), param.dtype, "cpu", seed=100 * step + i)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_matches_torch(backend, max_grad_norm):
    ours, theirs = _params(), _params()
    arguments = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.05}
    optimizer = AdamWEMA(ours, ema_decay=0.7, max_grad_norm=max_grad_norm, **arguments)
    plain = torch.optim.AdamW(theirs, **arguments)
    ema = [param.detach().clone() for param in theirs]
    with ops.use_backend(backend):
        for step in range(1, 8):
            _set_grads(ours, step)
            _set_grads(theirs, step)
            optimizer.step()
            norm = torch.nn.utils.get_total_norm([param.grad for param in theirs])
            torch.testing.assert_close(optimizer.grad_norm, norm)
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
            plain.step()
            for average, param in zip(ema, theirs, strict=True):
                average.lerp_(param.detach(), 1 - ema_decay_at(step, 0.7))
    # The clipping factor is float32 in the fused step.
    for out, want in zip([*ours, *optimizer.ema_parameters()], [*theirs, *ema], strict=True):
        torch.testing.assert_close(out.detach(), want.detach(), rtol=1e-6, atol=1e-7)


def test_norm_of_large_and_small_values():
    """Squares that float32 cannot hold, gradients of several dtypes, and no gradient at all."""
    big = [torch.tensor([3e30, 4e30])]
    assert torch.allclose(global_norm(big), torch.tensor(5e30))
    mixed = [torch.full((3, 3), 2.0), torch.full((7,), 1.0, dtype=torch.bfloat16), torch.ones(5, 2).double().T]
    for backend in ("reference", "cpu"):
        norm = global_norm(mixed, backend=backend)
        assert norm.dtype == torch.float64 and norm.item() == pytest.approx((36 + 7 + 10) ** 0.5)
    assert global_norm([]) == 0.0
    optimizer = AdamWEMA(_params(), lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0.0


def test_ema_warm_up():
    assert ema_decay_at(1, 0.999) == pytest.approx(1 - 2 ** (-2 / 3))
    assert ema_decay_at(31_622, 0.999) == 0.999
    assert ema_decay_at(31_000, 0.999) < 0.999
    assert ema_decay_at(5, 0.0) == 0.0


def test_state_dict_resumes_bit_for_bit():
    whole, halves = _params(torch.float32), _params(torch.float32)
    first, second = AdamWEMA(whole, lr=0.1), AdamWEMA(halves, lr=0.1)
    for step in range(1, 7):
        _set_grads(whole, step)
        first.step()
    for step in range(1, 4):
        _set_grads(halves, step)
        second.step()
    resumed = AdamWEMA(halves, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(4, 7):
        _set_grads(halves, step)
        resumed.step()
    for a, b in zip([*whole, *first.ema_parameters()], [*halves, *resumed.ema_parameters()], strict=True):
        assert torch.equal(a, b)


def test_parameters_without_gradient_keep_their_value():
    params = _params(torch.float32)
    before = [param.detach().clone() for param in params]
    optimizer = AdamWEMA(params, lr=0.1)
    _set_grads(params, 1)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before[1]) and not torch.equal(params[0], before[0])
    _set_grads(params, 2)  # from here on parameters of one group have different ages
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [2, 1, 2]


def test_ema_before_the_first_step_is_the_weights():
    params = _params(torch.float32)
    for param, ema in zip(params, AdamWEMA(params, lr=0.1).ema_parameters(), strict=True):
        assert torch.equal(param, ema) and ema.data_ptr() != param.data_ptr()


def test_closure_and_schedulers():
    """The usual ways of driving a torch optimizer work."""
    params = [torch.ones(3, requires_grad=True)]
    optimizer = AdamWEMA(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_bfloat16_parameters_have_float32_state():
    params = [draw((8,), torch.bfloat16, "cpu", seed=1).requires_grad_()]
    optimizer = AdamWEMA(params, lr=0.1)
    _set_grads(params, 1)
    optimizer.step()
    assert {name: value.dtype for name, value in optimizer.state[params[0]].items() if name != "step"} == {
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
        "ema": torch.float32,
    }


def _same(a, b):
    """Whether two pairs of parameters and their optimizer agree bit for bit."""
    (params, optimizer), (others, other) = a, b
    return all(
        torch.equal(x, y)
        for x, y in zip([*params, *optimizer.ema_parameters()], [*others, *other.ema_parameters()], strict=True)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_capturable_follows_tensors(backend):
    """The same numbers out of memory: steps, a schedule's learning rates, the EMA's warm-up, ages that differ."""
    plain, in_memory = _params(torch.float32), _params(torch.float32)
    arguments = {"lr": 0.1, "weight_decay": 0.05, "ema_decay": 0.6, "max_grad_norm": 0.5}
    optimizers = [
        AdamWEMA([{"params": params[:2]}, {"params": params[2:], "lr": 0.03}], **arguments, capturable=capturable)
        for params, capturable in ((plain, False), (in_memory, True))
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in optimizers]
    rates = [group["lr"] for group in optimizers[1].param_groups]
    with ops.use_backend(backend):
        for step in range(1, 7):
            for params, optimizer, schedule in zip((plain, in_memory), optimizers, schedules, strict=True):
                _set_grads(params, step)
                if step in (1, 4):
                    params[1].grad = None
                optimizer.step()
                schedule.step()
    ages = [optimizers[1].state[param]["step"] for param in in_memory]
    assert [age.item() for age in ages] == [6, 4, 6] and all(age.dtype == torch.int64 for age in ages)
    assert ages[0] is ages[2]
    assert all(group["lr"] is rate for group, rate in zip(optimizers[1].param_groups, rates, strict=True))
    torch.testing.assert_close(torch.stack(rates), torch.tensor([0.1, 0.03]) * 0.5**6)
    for out, want in zip(
        [*in_memory, *optimizers[1].ema_parameters()], [*plain, *optimizers[0].ema_parameters()], strict=True
    ):
        torch.testing.assert_close(out.detach(), want.detach(), rtol=1e-5, atol=1e-6)


class _NoReading(TorchDispatchMode):
    """Fails where the value of a tensor is asked for, which on a GPU waits for it and ends a capture."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_capturable_step_does_not_wait():
    params = _params(torch.float32)
    optimizer = AdamWEMA(params, lr=0.1, max_grad_norm=0.5, capturable=True)
    for step in range(1, 4):
        _set_grads(params, step)
        with _NoReading():
            optimizer.step()
    with pytest.raises(AssertionError), _NoReading():
        optimizer.state[params[0]]["step"].item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_loss_scale(backend, max_grad_norm, bad):
    """Scaled gradients give the steps of unscaled ones; of a step that overflowed nothing stays, not even its count."""
    plain, scaled = _params(torch.float32), _params(torch.float32)
    arguments = {"lr": 0.1, "weight_decay": 0.05, "ema_decay": 0.6, "max_grad_norm": max_grad_norm, "capturable": True}
    first, second = AdamWEMA(plain, **arguments), AdamWEMA(scaled, **arguments)
    scale, tracker, skipped = torch.tensor(2.0**12), torch.zeros((), dtype=torch.int32), []
    with ops.use_backend(backend):
        for step, overflows in enumerate([True, False, False, True, False, True, True, False]):
            _set_grads(plain, step)
            _set_grads(scaled, step)
            for param in scaled:
                param.grad.mul_(scale)
            if overflows:
                scaled[step % 3].grad.view(-1)[0] = bad
            else:
                first.step()
            before = [value.clone() for value in (*scaled, *second.ema_parameters())]
            with _NoReading():
                second.step(loss_scale=scale)
                torch._amp_update_scale_(scale, tracker, second.found_inf, 2.0, 0.5, 2)
            assert second.found_inf.dtype == torch.float32
            skipped.append(bool(second.found_inf))
            if overflows:
                after = (*scaled, *second.ema_parameters())
                assert not second.grad_norm.isfinite() and all(map(torch.equal, after, before))
            else:
                torch.testing.assert_close(second.grad_norm, first.grad_norm)
            assert _same((plain, first), (scaled, second))  # scales are powers of two, so rounding is the same
    assert skipped == [True, False, False, True, False, True, True, False]
    assert [int(second.state[param]["step"]) for param in scaled] == [4, 4, 4]
    assert scale == 2.0**9  # halved four times, doubled after the one pair of good steps


def test_a_loss_scale_needs_what_skips_a_step():
    params, scale = _params(torch.float32), torch.tensor(8.0)
    for arguments in ({}, {"capturable": True, "compute_grad_norm": False}):
        with pytest.raises(ValueError, match="capturable=True and compute_grad_norm=True"):
            AdamWEMA(params, **arguments).step(loss_scale=scale)
    for wrong in (8.0, scale.double(), torch.ones(1)):
        with pytest.raises(TypeError, match="want a float32 scalar tensor"):
            AdamWEMA(params, capturable=True).step(loss_scale=wrong)


def test_without_the_norm(monkeypatch):
    """Where only a part of the gradients is here, their norm would mean nothing, and costs a pass."""
    params, same = _params(torch.float32), _params(torch.float32)
    first, second = AdamWEMA(params, lr=0.1), AdamWEMA(same, lr=0.1, compute_grad_norm=False)
    _set_grads(params, 1)
    _set_grads(same, 1)
    first.step()
    monkeypatch.setattr("maskdm_fast.optim.ema_optimizer.global_norm", None)
    second.step()
    assert _same((params, first), (same, second)) and second.grad_norm is None
    with pytest.raises(ValueError, match="takes compute_grad_norm=True"):
        AdamWEMA(params, max_grad_norm=1.0, compute_grad_norm=False)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_state_moves_between_kinds(before, after):
    """What one optimizer saved the other continues, and numbers and tensors mean the same."""
    whole, halves = _params(torch.float32), _params(torch.float32)
    first = AdamWEMA(whole, lr=0.1, capturable=before)
    second = AdamWEMA(halves, lr=0.1, capturable=before)
    for step in range(1, 4):
        for params, optimizer in ((whole, first), (halves, second)):
            _set_grads(params, step)
            params[0].grad = params[0].grad if step > 1 else None
            optimizer.step()
    assert _same((whole, first), (halves, second))
    resumed = AdamWEMA(halves, lr=0.7, capturable=after)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    kind = torch.Tensor if after else int
    steps = [resumed.state[param]["step"] for param in halves]
    assert [int(step) for step in steps] == [2, 3, 3] and all(isinstance(step, kind) for step in steps)
    assert isinstance(resumed.param_groups[0]["lr"], torch.Tensor if after else float)
    for params, optimizer in ((whole, first), (halves, resumed)):
        _set_grads(params, 4)
        optimizer.step()
    if before == after:
        assert _same((whole, first), (halves, resumed))
    else:
        for out, want in zip(halves, whole, strict=True):
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_loading_keeps_the_precision_of_the_state():
    """torch.optim gives loaded states the dtype of the parameter: bfloat16 moments, which the op refuses."""
    params = [draw((8,), torch.bfloat16, "cpu", seed=1).requires_grad_()]
    optimizer = AdamWEMA(params, lr=0.1)
    _set_grads(params, 1)
    optimizer.step()
    resumed = AdamWEMA(params, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq", "ema"):
        assert torch.equal(resumed.state[params[0]][name], optimizer.state[params[0]][name])
    resumed.step()


def test_a_number_for_a_captured_learning_rate_is_refused():
    params = _params(torch.float32)
    optimizer = AdamWEMA(params, lr=0.1, capturable=True)
    _set_grads(params, 1)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(TypeError, match=r'use group\["lr"\].fill_\(0.2\)'):
        optimizer.step()


def test_state_cannot_be_made_within_a_capture(monkeypatch):
    params = _params(torch.float32)
    optimizer = AdamWEMA(params, lr=0.1, capturable=True)
    _set_grads(params, 1)
    with monkeypatch.context() as patch:
        patch.setattr("maskdm_fast.ops.backend.is_capturing", lambda tensor: True)
        with pytest.raises(RuntimeError, match="run a step before the capture"):
            optimizer.step()
    optimizer.step()
    params[1].grad = None
    monkeypatch.setattr("maskdm_fast.ops.backend.is_capturing", lambda tensor: True)
    with pytest.raises(RuntimeError, match="other parameters have a gradient than in the step before"):
        optimizer.step()
