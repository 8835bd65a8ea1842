import pytest
import torch

from maskdm_fast.diffusion import make_schedule, to_eps, to_v, to_x0
from maskdm_fast.diffusion.prediction import PREDICTIONS, coefficients, x0_coefficients

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
    with pytest.raises(ValueError, match="unknown prediction 'score', want one of eps, x0, v, flow, edm"):
        convert(xt, xt, alpha, sigma, "score")


@pytest.mark.parametrize("name", ["cosine", "vp", "flow", "edm"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_is_linear_in_noise_and_image(name, prediction):
    t = {"cosine": [1.0, 400.0, 900.0], "edm": [0.01, 1.0, 50.0]}.get(name, [0.01, 0.5, 0.95])
    alpha, sigma = make_schedule(name).alpha_sigma(torch.tensor(t, dtype=torch.float64))
    x0, eps = torch.randn(2, 3, 5, dtype=torch.float64)
    xt = alpha[:, None] * x0 + sigma[:, None] * eps
    a, b = (scale[:, None] for scale in coefficients(prediction, alpha, sigma))
    pred = a * eps + b * x0
    torch.testing.assert_close(to_x0(pred, xt, alpha, sigma, prediction), x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(to_eps(pred, xt, alpha, sigma, prediction), eps, rtol=1e-8, atol=1e-8)
    # An error of pred is amplified by the factor that the docstring names.
    factor = -sigma / (a * alpha[:, None] - b * sigma[:, None])[:, 0]
    torch.testing.assert_close(x0_coefficients(prediction, alpha, sigma)[1], factor)
    torch.testing.assert_close(
        to_x0(pred + 0.1, xt, alpha, sigma, prediction), x0 + 0.1 * factor[:, None], rtol=1e-8, atol=1e-8
    )
