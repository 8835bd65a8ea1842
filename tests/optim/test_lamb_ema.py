"""LambEMA against LAMB written out, tensor by tensor; what it shares with AdamWEMA is tested there."""

import copy

import pytest
import torch

from maskdm_fast import ops
from maskdm_fast.optim import AdamWEMA, LambEMA, ema_decay_at
from maskdm_fast.testing import draw

SHAPES = [(5, 3), (4,), (2, 2, 2)]
SETTINGS = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.05, "ema_decay": 0.7}


def _params(dtype=torch.float64, scale=1.0):
    return [draw(shape, dtype, "cpu", seed=i).mul_(scale).requires_grad_() for i, shape in enumerate(SHAPES)]


def _set_grads(params, step):
    for i, param in enumerate(params):
        param.grad = draw(tuple(param.shape), param.dtype, "cpu", seed=100 * step + i)


def _lamb(param, grads, min_ndim):
    """Values and averages of `param` (left as it is) after each gradient, by the paper's algorithm 2."""
    (beta1, beta2), results = SETTINGS["betas"], []
    x, ema, m, v = param.detach().clone(), param.detach().clone(), 0.0, 0.0
    for step, g in enumerate(grads, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        r = m / (1 - beta1**step) / ((v / (1 - beta2**step)) ** 0.5 + SETTINGS["eps"]) + SETTINGS["weight_decay"] * x
        ratio = float(x.norm() / r.norm()) if x.ndim >= min_ndim and x.norm() > 0 and r.norm() > 0 else 1.0
        x = x - SETTINGS["lr"] * ratio * r
        ema = ema + (1 - ema_decay_at(step, SETTINGS["ema_decay"])) * (x - ema)
        results.append((x, ema))
    return results


@pytest.mark.parametrize("min_ndim", [0, 2])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_matches_the_algorithm(backend, min_ndim):
    params = _params()
    params[2].data.zero_()  # its first step has the ratio 1, the others do not
    optimizer = LambEMA(params, **SETTINGS, min_ndim=min_ndim)
    grads = [[draw(shape, torch.float64, "cpu", seed=100 * n + i) for n in range(5)] for i, shape in enumerate(SHAPES)]
    wanted = [_lamb(param, of_param, min_ndim) for param, of_param in zip(params, grads, strict=True)]
    with ops.use_backend(backend):
        for step in range(5):
            for param, of_param in zip(params, grads, strict=True):
                param.grad = of_param[step]
            optimizer.step()
            for param, ema, (want, want_ema) in zip(
                params, optimizer.ema_parameters(), [results[step] for results in wanted], strict=True
            ):
                torch.testing.assert_close(param.detach(), want)
                torch.testing.assert_close(ema, want_ema)


def test_steps_are_relative_to_the_weights():
    """Of a tensor ten times as large, without decay, every step is ten times as long: what large batches need."""
    small, large = _params(), _params(scale=10.0)
    for params in (small, large):
        optimizer = LambEMA(params, lr=0.1, min_ndim=0)
        for step in range(3):
            _set_grads(params, step)
            optimizer.step()
    for x, y in zip(small, large, strict=True):
        torch.testing.assert_close(10 * x.detach(), y.detach())


def test_what_is_not_adapted_takes_the_step_of_adamw():
    params, same = _params(torch.float32), _params(torch.float32)
    adamw, lamb = AdamWEMA(params, **SETTINGS), LambEMA(same, **SETTINGS, min_ndim=4)
    for step in range(4):
        _set_grads(params, step)
        _set_grads(same, step)
        adamw.step()
        lamb.step()
    for out, want in zip([*same, *lamb.ema_parameters()], [*params, *adamw.ema_parameters()], strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def test_clipping_a_loss_scale_and_skipped_steps():
    plain, scaled = _params(torch.float32), _params(torch.float32)
    first = LambEMA(plain, **SETTINGS, max_grad_norm=0.5, capturable=True)
    second = LambEMA(scaled, **SETTINGS, max_grad_norm=0.5, capturable=True)
    scale = torch.tensor(1024.0)
    for step, overflows in enumerate([True, False, True, False]):
        _set_grads(plain, step)
        _set_grads(scaled, step)
        for param in scaled:
            param.grad.mul_(scale)
        if overflows:
            scaled[1].grad[2] = float("inf")
        else:
            first.step()
        second.step(loss_scale=scale)
        assert bool(second.found_inf) == overflows
        for out, want in zip([*scaled, *second.ema_parameters()], [*plain, *first.ema_parameters()], strict=True):
            assert torch.equal(out, want)
    assert [int(second.state[param]["step"]) for param in scaled] == [2, 2, 2]


@pytest.mark.parametrize("kinds", [(AdamWEMA, LambEMA), (LambEMA, AdamWEMA), (LambEMA, LambEMA)])
def test_a_run_goes_on_with_the_other(kinds):
    """The states are alike; what only one of them knows it takes from its own settings."""
    before, after = kinds
    params = _params(torch.float32)
    first = before(params, lr=0.1)
    for step in range(3):
        _set_grads(params, step)
        first.step()
    second = after(params, lr=0.7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _set_grads(params, 3)
    second.step()
    assert all(second.state[param]["step"] == 4 for param in params)
    assert second.param_groups[0]["lr"] == 0.1


def test_groups_with_settings_of_their_own():
    params, same = _params(), _params()
    groups = [{"params": params[:2], "min_ndim": 1}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = LambEMA(groups, **SETTINGS)
    others = [LambEMA(same[:2], **SETTINGS | {"min_ndim": 1}), LambEMA(same[2:], **SETTINGS | {"weight_decay": 0.0})]
    _set_grads(params, 1)
    _set_grads(same, 1)
    for each in (optimizer, *others):
        each.step()
    assert all(torch.equal(x, y) for x, y in zip(params, same, strict=True))


def test_errors_name_it():
    with pytest.raises(ValueError, match=r"LambEMA: lr -1\.0"):
        LambEMA(_params(), lr=-1.0)
