import pytest
import torch

from maskdm_fast.diffusion import to_eps, to_v, to_x0

CONVERT = {"eps": to_eps, "x0": to_x0, "v": to_v}


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    alpha = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    a, s = alpha[:, None, None], sigma[:, None, None]
    return a * x0 + s * eps, alpha, sigma, {"eps": eps, "x0": x0, "v": a * eps - s * x0}


@pytest.mark.parametrize("source", CONVERT)
@pytest.mark.parametrize("target", CONVERT)
def test_conversions(state, source, target):
    xt, alpha, sigma, values = state
    out = CONVERT[target](values[source], xt, alpha, sigma, source)
    torch.testing.assert_close(out, values[target], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", CONVERT)
@pytest.mark.parametrize("target", CONVERT)
def test_round_trips_of_any_prediction(state, source, target):
    xt, alpha, sigma, _ = state
    pred = torch.ones_like(xt)
    there = CONVERT[target](pred, xt, alpha, sigma, source)
    torch.testing.assert_close(CONVERT[source](there, xt, alpha, sigma, target), pred, rtol=1e-10, atol=1e-10)


def test_scales_follow_the_dtype_of_the_tokens(state):
    xt, alpha, sigma, values = state
    assert to_x0(values["eps"].float(), xt.float(), alpha, sigma, "eps").dtype == torch.float32


@pytest.mark.parametrize("convert", CONVERT.values())
def test_unknown_prediction(state, convert):
    xt, alpha, sigma, _ = state
    with pytest.raises(ValueError, match="unknown prediction 'score', want one of eps, x0, v"):
        convert(xt, xt, alpha, sigma, "score")
