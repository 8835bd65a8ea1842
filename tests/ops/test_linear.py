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


def test_the_meta_device_gives_shapes():
    given = {name: value.detach().to("meta") for name, value in inputs().items()}
    assert ops.linear(**given).shape == (2, 7, 5)
    assert ops.gelu(given["x"]).shape == (2, 7, 12)


def test_only_float32_goes_to_onednn():
    assert not backend.onednn_is_faster(torch.float64)
    assert not backend.onednn_is_faster(torch.bfloat16)


@pytest.mark.parametrize(("wanted", "expected"), [("onednn", True), ("pytorch", False)])
def test_the_environment_names_the_library(monkeypatch, wanted, expected):
    monkeypatch.setenv(backend.PRODUCTS_VARIABLE, wanted)
    assert backend._prefer_onednn() == (expected and backend.has_native())


@pytest.mark.parametrize(("level", "intel", "expected"), [(4, False, True), (4, True, False), (3, False, False)])
def test_the_rule_is_by_instruction_set_and_vendor(monkeypatch, level, intel, expected):
    monkeypatch.delenv(backend.PRODUCTS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.ops.maskdm_fast, "cpu_isa_level", lambda: level)
    monkeypatch.setattr(torch.ops.maskdm_fast, "cpu_is_intel", lambda: intel)
    assert backend._prefer_onednn() == expected


def test_an_unknown_library_is_an_error(monkeypatch):
    monkeypatch.setenv(backend.PRODUCTS_VARIABLE, "mkl")
    with pytest.raises(ValueError, match="MASKDM_FAST_PRODUCTS is 'mkl', want auto, onednn or pytorch"):
        backend._prefer_onednn()
