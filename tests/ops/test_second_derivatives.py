"""Second derivatives, which the kernels do not have, are refused in every way of asking, and nothing else is."""

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from maskdm_fast import ops

CASES = {op: importlib.import_module(f"maskdm_fast.ops.{op}.cases") for op in ops.IMPLEMENTATIONS}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
REFUSED = "(gather_tokens|scatter_tokens|{op}): a second derivative is asked of it"


def _loss(cases, case, backend, squared):
    """A loss, and parameters with a step between them and the op, as those of a network have."""
    inputs = cases.make_inputs(case, torch.float32, "cpu", seed=0)
    names = [name for name in cases.WITH_GRAD if inputs[name] is not None]
    params = [inputs[name].detach().clone().requires_grad_() for name in names]
    given = inputs | {name: 2 * param for name, param in zip(names, params, strict=True)}
    outputs = cases.call(given, backend).values()
    return sum((output.square() if squared else output).sum() for output in outputs), params


def _by_grad(loss, params):
    grads = torch.autograd.grad(loss, params, create_graph=True)
    return torch.autograd.grad(loss + sum(grad.square().sum() for grad in grads), params)


def _by_backward(loss, params):
    grads = torch.autograd.grad(loss, params, create_graph=True)
    (loss + sum(grad.square().sum() for grad in grads)).backward()
    return [param.grad for param in params]


def _through_attributes(loss, params):
    loss.backward(create_graph=True)
    return torch.autograd.grad(loss + sum(param.grad.square().sum() for param in params), params)


@BACKENDS
@pytest.mark.filterwarnings("ignore:Using backward")  # of a cycle in memory
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("way", [_by_grad, _by_backward, _through_attributes])
@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].WITH_GRAD])
def test_refused(op, way, squared, backend):
    """Regression: they were taken for 0 where the incoming gradient was a constant, and by `torch.autograd.grad`."""
    for case in CASES[op].CASES:
        print(case)  # shown when the test fails
        loss, params = _loss(CASES[op], case, backend, squared)
        if op == "gather_tokens" and not squared:  # the gradients are constants
            first = torch.autograd.grad(loss, params, retain_graph=True)
            torch.testing.assert_close(way(loss, params), first)
            continue
        with pytest.raises(RuntimeError, match=REFUSED.format(op=op)):
            way(loss, params)


@BACKENDS
@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].WITH_GRAD])
def test_first_derivatives_are_the_same_with_a_graph(op, backend):
    for case in CASES[op].CASES:
        loss, params = _loss(CASES[op], case, backend, True)
        plain = torch.autograd.grad(loss, params, retain_graph=True)
        with_graph = torch.autograd.grad(loss, params, create_graph=True)
        for grad, other in zip(plain, with_graph, strict=True):
            assert torch.equal(grad, other), case.name
            with torch.no_grad():
                other.mul_(0.5)  # as clipping does


def test_a_constant_gradient_has_nothing_to_refuse():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    (grad,) = torch.autograd.grad(ops.linear(x, weight, backend="cpu").sum(), x, create_graph=True)
    assert not grad.requires_grad


def test_refused_under_activation_checkpointing():
    """Which hands saved tensors out once."""
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpoint(ops.gelu, x, use_reentrant=False).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)[0])
    with pytest.raises(RuntimeError, match="gelu: a second derivative"):
        grad.sum().backward()
