"""Steps with a loss scale: on the device alone, and in a CUDA graph, whose replays decide anew which are skipped."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskdm_fast import testing
from maskdm_fast.ops import backend
from maskdm_fast.optim import AdamWEMA, LambEMA
from maskdm_fast.testing import draw

KINDS = pytest.mark.parametrize("kind", [AdamWEMA, LambEMA])
OVERFLOWS = (False, True, False, False, True)


def _make(kind, device):
    params = [
        draw(shape, torch.float32, device, seed=i).requires_grad_() for i, shape in enumerate([(33, 5), (9000,), (3,)])
    ]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params, kind(params, lr=0.1, weight_decay=0.03, max_grad_norm=0.5, capturable=True)


def _set_grads(params, step, scale, overflows):
    for i, param in enumerate(params):
        param.grad.copy_(draw(tuple(param.shape), torch.float32, param.device, seed=100 * step + i) * scale)
    if overflows:
        params[step % 3].grad.view(-1)[step] = float("nan")


def _values(params, optimizer):
    return [value.detach().clone() for value in (*params, *optimizer.ema_parameters())]


@KINDS
def test_a_step_does_not_wait_for_the_device(kind, device):
    params, optimizer = _make(kind, device)
    scale = torch.tensor(64.0, device=device)
    for step, overflows in enumerate(OVERFLOWS):
        _set_grads(params, step, scale, overflows)
        before = _values(params, optimizer)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(loss_scale=scale)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert bool(optimizer.found_inf) == overflows
        assert all(map(torch.equal, _values(params, optimizer), before)) == overflows
    assert all(optimizer.state[param]["step"].item() == OVERFLOWS.count(False) for param in params)


@KINDS
@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
def test_nothing_is_copied_between_host_and_device(kind, monkeypatch):
    """The same without a GPU, on fake tensors of one; the first step makes the state."""
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)  # it asks the driver
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.empty(5, 3, device="cuda"))
        param.grad, scale = torch.empty_like(param), torch.empty((), device="cuda")
        optimizer = kind([param], max_grad_norm=0.5, capturable=True)
        optimizer.step(loss_scale=scale)
        with testing.NoTransfer():
            optimizer.step(loss_scale=scale)
        assert optimizer.found_inf.device == optimizer.grad_norm.device == param.device


@KINDS
def test_a_replay_decides_anew(kind, cuda):
    (params, optimizer), (same, eager) = _make(kind, cuda), _make(kind, cuda)
    scale = torch.tensor(64.0, device=cuda)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        optimizer.step(loss_scale=scale)  # makes the state; gradients are 0
    torch.cuda.current_stream().wait_stream(side)
    eager.step(loss_scale=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(loss_scale=scale)
    for step, overflows in enumerate(OVERFLOWS):
        for each in (params, same):
            _set_grads(each, step, scale, overflows)
        graph.replay()
        eager.step(loss_scale=scale)
        assert bool(optimizer.found_inf) == bool(eager.found_inf) == overflows
        assert all(map(torch.equal, _values(params, optimizer), _values(same, eager)))
        scale.mul_(0.5)
