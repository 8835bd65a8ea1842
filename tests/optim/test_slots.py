"""Optimizers without the slots that nobody wants, and gradients that are cut by value."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast import ops
from maskdm_fast.optim import AdamWEMA, ApexAdamEMA, LambEMA
from maskdm_fast.optim.ema_optimizer import cut_by_value_
from maskdm_fast.testing import draw

SHAPES = [(5, 3), (4,), (2, 2, 2)]
ARGUMENTS = {"lr": 0.02, "betas": (0.0, 0.97), "weight_decay": 0.05, "max_grad_norm": 0.5}


def _params(dtype=torch.float32):
    return [draw(shape, dtype, "cpu", seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def _train(params, optimizer, first, last):
    for step in range(first, last):
        for i, param in enumerate(params):
            param.grad = draw(tuple(param.shape), param.dtype, "cpu", seed=100 * step + i)
        optimizer.step()


def _slots(optimizer, params):
    return [sorted(optimizer.state[param]) for param in params]


class _WithFirstMoment(AdamWEMA):
    _keeps_first_moment = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_steps_are_the_same_without_the_slots(backend, capturable, dtype):
    params, whole = _params(dtype), _params(dtype)
    optimizer = AdamWEMA(params, **ARGUMENTS, ema_decay=None, capturable=capturable)
    other = _WithFirstMoment(whole, **ARGUMENTS, capturable=capturable)
    with ops.use_backend(backend):
        _train(params, optimizer, 1, 6)
        _train(whole, other, 1, 6)
    assert _slots(optimizer, params) == [["exp_avg_sq", "step"]] * 3
    assert _slots(other, whole) == [["ema", "exp_avg", "exp_avg_sq", "step"]] * 3
    for param, wanted in zip(params, whole, strict=True):
        assert torch.equal(param, wanted)
        assert torch.equal(optimizer.state[param]["exp_avg_sq"], other.state[wanted]["exp_avg_sq"])
    with pytest.raises(RuntimeError, match="AdamWEMA: ema_decay is None, so there is no average of the weights"):
        optimizer.ema_parameters()


def test_groups_have_slots_of_their_own():
    params = _params()
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "betas": (0.9, 0.99)},
        {"params": params[2:], "ema_decay": None},
    ]
    optimizer = AdamWEMA(groups, **ARGUMENTS)
    optimizer.make_state()
    assert [optimizer.state[param]["step"] for param in params] == [0, 0, 0]
    _train(params, optimizer, 1, 3)
    assert _slots(optimizer, params) == [
        ["ema", "exp_avg_sq", "step"],
        ["ema", "exp_avg", "exp_avg_sq", "step"],
        ["exp_avg_sq", "step"],
    ]


@pytest.mark.parametrize("ema_decay", [0.7, None])
def test_state_dict_resumes_bit_for_bit(ema_decay):
    whole, halves = _params(), _params()
    first, second = (AdamWEMA(params, **ARGUMENTS, ema_decay=ema_decay) for params in (whole, halves))
    _train(whole, first, 1, 7)
    _train(halves, second, 1, 4)
    resumed = AdamWEMA(halves, **ARGUMENTS, ema_decay=ema_decay)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    _train(halves, resumed, 4, 7)
    assert all(map(torch.equal, whole, halves)) and _slots(resumed, halves) == _slots(first, whole)


def test_what_is_not_wanted_is_dropped_and_what_is_missing_is_said():
    params, same = _params(), _params()
    full, lean = AdamWEMA(params, **{**ARGUMENTS, "betas": (0.9, 0.97)}), AdamWEMA(same, **ARGUMENTS, ema_decay=None)
    _train(params, full, 1, 3)
    _train(same, lean, 1, 3)
    saved = {name: optimizer.state_dict() for name, optimizer in (("full", full), ("lean", lean))}
    lean.load_state_dict({**saved["lean"], "state": saved["full"]["state"]})
    assert _slots(lean, same) == [["exp_avg_sq", "step"]] * 3
    for param, wanted in zip(same, params, strict=True):
        assert torch.equal(lean.state[param]["exp_avg_sq"], full.state[wanted]["exp_avg_sq"])
    with pytest.raises(ValueError, match=r"what was saved has no exp_avg, which betas \(0.9, 0.97\) takes"):
        full.load_state_dict({**saved["full"], "state": saved["lean"]["state"]})
    averaging = AdamWEMA(same, **ARGUMENTS, ema_decay=0.5)
    with pytest.raises(ValueError, match=r"what was saved has no ema, which ema_decay 0.5 takes"):
        averaging.load_state_dict({**averaging.state_dict(), "state": saved["lean"]["state"]})


def test_settings_that_were_saved_come_with_the_state():
    """As torch's optimizers do it: nothing is lost by loading into an optimizer with other settings."""
    params, same = _params(), _params()
    full, lean = AdamWEMA(params, lr=0.1), AdamWEMA(same, **ARGUMENTS, ema_decay=None)
    _train(params, full, 1, 3)
    lean.load_state_dict(copy.deepcopy(full.state_dict()))
    assert lean.param_groups[0]["betas"] == (0.9, 0.999) and _slots(lean, same) == _slots(full, params)


@pytest.mark.parametrize("kind", [LambEMA, ApexAdamEMA])
def test_kernels_that_need_the_first_moment_keep_it(kind, install_apex):
    """What another kernel saved without it continues: with beta1 = 0 its values do not count."""
    install_apex("nvidia_apex")
    params, same, lean_params = _params(), _params(), _params()
    whole, part, lean = kind(params, **ARGUMENTS), kind(same, **ARGUMENTS), AdamWEMA(lean_params, **ARGUMENTS)
    for each, optimizer in ((params, whole), (same, part)):
        _train(each, optimizer, 1, 4)
    assert _slots(whole, params) == [["ema", "exp_avg", "exp_avg_sq", "step"]] * 3
    lean.load_state_dict(copy.deepcopy(part.state_dict()))
    assert _slots(lean, lean_params) == [["ema", "exp_avg_sq", "step"]] * 3
    resumed = kind(same, **ARGUMENTS)
    resumed.load_state_dict({**resumed.state_dict(), "state": lean.state_dict()["state"]})
    _train(params, whole, 4, 7)
    _train(same, resumed, 4, 7)
    assert all(map(torch.equal, params, same))


def test_lamb_always_has_an_average():
    with pytest.raises(ValueError, match="LambEMA: ema_decay is None, but its kernels always keep the average"):
        LambEMA(_params(), ema_decay=None)


def test_apex_without_an_average(install_apex):
    install_apex("nvidia_apex")
    params, same = _params(), _params()
    apex, ours = (kind(each, **ARGUMENTS, ema_decay=None) for kind, each in ((ApexAdamEMA, params), (AdamWEMA, same)))
    _train(params, apex, 1, 4)
    _train(same, ours, 1, 4)
    torch.testing.assert_close(params, same, rtol=1e-5, atol=1e-6)
    assert _slots(apex, params) == [["exp_avg", "exp_avg_sq", "step"]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_that_are_cut(dtype):
    grads = [torch.tensor([[torch.nan, 3.0], [-torch.inf, -0.25]], dtype=dtype), torch.tensor([torch.inf], dtype=dtype)]
    grads.append(torch.tensor([1e4, -1e4], dtype=torch.float32))
    kept = list(grads)
    cut_by_value_(grads, 0.5)
    assert grads[0].tolist() == [[0.0, 0.5], [-0.5, -0.25]] and grads[1].tolist() == [0.5]
    assert grads[2].tolist() == [0.5, -0.5] and all(a is b for a, b in zip(grads, kept, strict=True))
    cut_by_value_([], 0.5)


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [AdamWEMA, LambEMA, ApexAdamEMA])
def test_gradients_are_cut_before_the_norm_and_the_step(kind, install_apex):
    install_apex("nvidia_apex")
    params, same = _params(), _params()
    optimizer = kind(params, lr=0.1, max_grad_norm=0.5, max_grad_value=0.2)
    wanted = kind(same, lr=0.1, max_grad_norm=0.5)
    for step in range(1, 4):
        for i, (param, other) in enumerate(zip(params, same, strict=True)):
            grad = draw(tuple(param.shape), torch.float32, "cpu", seed=100 * step + i)
            param.grad, other.grad = grad.clone(), grad.clamp(-0.2, 0.2)
        for place, (bad, good) in enumerate([(torch.nan, 0.0), (torch.inf, 0.2), (-torch.inf, -0.2)]):
            params[0].grad[step, place], same[0].grad[step, place] = bad, good
        if kind is AdamWEMA:
            with _NoReading():
                optimizer.step()
        else:
            optimizer.step()
        wanted.step()
        assert torch.equal(optimizer.grad_norm, wanted.grad_norm) and bool(optimizer.grad_norm.isfinite())
        assert all(map(torch.equal, params, same))


def test_a_loss_scale_would_be_blind():
    optimizer = AdamWEMA(_params(), capturable=True, max_grad_value=1.0)
    with pytest.raises(ValueError, match=r"max_grad_value is 1.0, which would hide the overflows"):
        optimizer.step(loss_scale=torch.tensor(8.0))
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"max_grad_value is .*, want a positive number or None"):
            AdamWEMA(_params(), max_grad_value=wrong)
