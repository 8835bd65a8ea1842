"""What holds for every optimizer of torch: stale graphs are refused, copies work on, AdamW's state loads."""

import copy
import pickle

import pytest
import torch
from torch import nn

from maskdm_fast import ops
from maskdm_fast.optim import AdamWEMA, ApexAdamEMA, LambEMA
from maskdm_fast.testing import draw

SHAPES = [(5, 3), (4,), (2, 2, 2)]
KINDS = pytest.mark.parametrize("kind", [AdamWEMA, LambEMA, ApexAdamEMA])


@pytest.fixture(autouse=True)
def _apex(install_apex):
    install_apex("nvidia_apex")


def _params():
    return [draw(shape, torch.float32, "cpu", seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def _train(optimizer, first, last):
    for step in range(first, last):
        for i, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = draw(tuple(param.shape), param.dtype, "cpu", seed=100 * step + i)
        optimizer.step()


@KINDS
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_graph_of_the_old_weights_is_refused(backend, kind):
    """Regression: its gradient came out, and was wrong, for the kernels told autograd of no change."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = kind(net.parameters(), lr=0.5)
    x = torch.randn(5, 4, requires_grad=True)
    out = net(x).mean()
    out.backward(retain_graph=True)
    with ops.use_backend(backend):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", [ops.adamw_ema, ops.lamb_ema])
def test_the_op_tells_of_what_networks_compute_with(op, backend):
    params, grads, m, v, emas = [[torch.ones(3)] for _ in range(5)]
    copies = [torch.ones(3, dtype=torch.bfloat16)]
    before = [tensor._version for tensor in (*params, *emas, *copies, *grads)]
    op(params, grads, m, v, emas, lr=0.1, step=1, ema_decay=0.9, copies=copies, backend=backend)
    after = [tensor._version for tensor in (*params, *emas, *copies, *grads)]
    assert [new > old for old, new in zip(before, after, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize("op", [ops.adamw_ema, ops.lamb_ema])
def test_tensors_of_inference_mode_have_no_version(op):
    with torch.inference_mode():
        params, grads, m, v, emas = [[torch.ones(3)] for _ in range(5)]
    op(params, grads, m, v, emas, lr=0.1, step=1, ema_decay=0.9, backend="cpu")
    assert (params[0] != 1).all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {}) for kind in (AdamWEMA, LambEMA, ApexAdamEMA)]
    + [(kind, {"capturable": True}) for kind in (AdamWEMA, LambEMA)],
)
def test_a_copy_goes_on_as_the_original(kind, settings, way):
    """Regression: torch copies what it knows of, and the first step of a copy missed the rest."""
    optimizer = kind(_params(), lr=0.02, max_grad_norm=0.5, max_grad_value=0.4, **settings)
    _train(optimizer, 1, 4)
    other = way(optimizer)
    assert torch.equal(other.grad_norm, optimizer.grad_norm) and other.found_inf is None
    params, copied = (each.param_groups[0]["params"] for each in (optimizer, other))
    assert all(torch.equal(a, b) and a is not b for a, b in zip(params, copied, strict=True))
    for each in (optimizer, other):
        _train(each, 4, 7)
    assert all(map(torch.equal, params, copied))
    assert all(map(torch.equal, optimizer.ema_parameters(), other.ema_parameters()))
    before = [param.clone() for param in params]
    _train(other, 7, 8)
    assert all(map(torch.equal, params, before))


def test_the_state_of_adamw_loads():
    """Regression: a group without ema_decay ended in a KeyError. An average that is wanted and not there is said."""
    params, same = _params(), _params()
    settings = {"lr": 0.02, "betas": (0.8, 0.97), "weight_decay": 0.05}
    theirs = torch.optim.AdamW(params, **settings)
    _train(theirs, 1, 4)
    with torch.no_grad():
        for mine, other in zip(same, params, strict=True):
            mine.copy_(other)
    ours = AdamWEMA(same, ema_decay=None)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for each in (theirs, ours):
        _train(each, 4, 7)
    torch.testing.assert_close(same, params, rtol=1e-5, atol=1e-6)
    averaging = AdamWEMA(_params())
    with pytest.raises(ValueError, match=r"AdamWEMA: what was saved has no ema, which ema_decay 0.9999 takes"):
        averaging.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("theirs", "settings", "message"),
    [
        (torch.optim.AdamW, {"amsgrad": True, "maximize": True}, "comes with amsgrad and maximize, which"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "comes with a weight decay within the gradient, which"),
    ],
)
def test_another_algorithm_does_not_go_on_as_this_one(theirs, settings, message):
    optimizer = AdamWEMA(_params(), ema_decay=None)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(theirs(_params(), **settings).state_dict())
    optimizer.load_state_dict(torch.optim.Adam(_params()).state_dict())


@KINDS
@pytest.mark.parametrize("max_grad_value", [None, 1.0])
def test_sparse_gradients_are_refused(kind, max_grad_value):
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = kind(embedding.parameters(), max_grad_value=max_grad_value)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: sparse gradients are not supported"):
        optimizer.step()
