"""The two ways of linear that the parity tests cannot reach: the automatic choice, and autocast."""

import pytest
import torch

from maskdm_fast import ops
from maskdm_fast.ops import backend
from maskdm_fast.ops.linear.op import _Linear


def inputs(bias: bool = True, residual: bool = True):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 7, 12), "weight": (5, 12), "bias": (5,), "residual": (2, 7, 5)}
    made = {name: torch.randn(shape, generator=generator, requires_grad=True) for name, shape in shapes.items()}
    return made | ({} if bias else {"bias": None}) | ({} if residual else {"residual": None})


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_either_choice_gives_the_same(monkeypatch, faster, bias, residual):
    monkeypatch.setattr(backend, "onednn_is_faster", lambda dtype: faster)
    calls = []
    apply = _Linear.apply
    monkeypatch.setattr(_Linear, "apply", lambda *arguments: calls.append(1) or apply(*arguments))
    given = inputs(bias, residual)
    leaves = [value for value in given.values() if value is not None]
    out = ops.linear(**given)
    assert bool(calls) == (faster and backend.has_native())
    want = ops.linear(**given, backend="reference")
    torch.testing.assert_close(out, want)
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (out, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast(bias):
    given = inputs(bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.linear(**given)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.float(), ops.linear(**given), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert given["weight"].grad.dtype == torch.float32


def test_the_choice_is_a_rule_of_the_processor():
    """float32 alone; and the same answer every time, so that a resumed run multiplies as before."""
    assert not backend.onednn_is_faster(torch.float64)
    assert not backend.onednn_is_faster(torch.bfloat16)
    assert len({backend.onednn_is_faster(torch.float32) for _ in range(3)}) == 1
