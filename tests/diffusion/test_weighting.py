import pytest
import torch

from maskdm_fast.diffusion import LossWeight, make_schedule
from maskdm_fast.diffusion.prediction import x0_coefficients

ALPHA, SIGMA = (scale.double() for scale in make_schedule("cosine").alpha_sigma(torch.tensor([5, 300, 600, 950])))
SNR = (ALPHA / SIGMA) ** 2


def weight(kind, prediction, **settings):
    out = LossWeight(kind, **settings)(ALPHA, SIGMA, prediction)
    assert out.dtype == torch.float32 and out.shape == (4,)
    return out.double()


def test_none_weighs_nothing():
    assert LossWeight()(ALPHA, SIGMA, "eps") is None


@pytest.mark.parametrize(
    ("prediction", "want"),
    [
        ("eps", SNR.clamp(max=5) / SNR),
        ("x0", SNR.clamp(max=5)),
        ("v", SNR.clamp(max=5) / (SNR + 1)),
    ],
)
def test_min_snr_as_published(prediction, want):
    torch.testing.assert_close(weight("min-snr", prediction), want, rtol=1e-5, atol=0.0)


def test_p2_as_published():
    torch.testing.assert_close(weight("p2", "eps"), 1 / (1 + SNR), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(weight("p2", "eps", p2_gamma=0.5, p2_k=2.0), (2 + SNR) ** -0.5, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(weight("p2", "eps", p2_gamma=0.0), torch.ones(4).double(), rtol=1e-5, atol=0.0)


def test_edm_as_published():
    level = SIGMA / ALPHA
    want = (level**2 + 0.25) / (level * 0.5) ** 2
    torch.testing.assert_close(weight("edm", "x0"), want, rtol=1e-5, atol=0.0)
    schedule = make_schedule("edm")
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.002, 0.5, 80.0]))
    # The preconditioned network is made such that this weight is 1 on its own output.
    torch.testing.assert_close(LossWeight("edm")(alpha, sigma, "edm"), torch.ones(3))


@pytest.mark.parametrize("kind", ["min-snr", "p2", "edm"])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "edm"])
def test_says_the_same_whatever_is_predicted(kind, prediction):
    """The same error of x0 has the same weighted loss."""
    error = 0.1 / x0_coefficients(prediction, ALPHA, SIGMA)[1]
    torch.testing.assert_close(weight(kind, prediction) * error**2, weight(kind, "x0") * 0.1**2, rtol=1e-5, atol=0.0)


def test_is_finite_where_nothing_is_left_of_the_image():
    alpha, sigma = make_schedule("flow").alpha_sigma(torch.tensor([1.0, 1 - 2.0**-24, 2.0**-24]))
    for kind in ("min-snr", "p2", "edm"):
        assert LossWeight(kind)(alpha, sigma, "flow").isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "snr"}, "unknown loss weight 'snr', want one of none, min-snr, p2, edm"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0, want more than 0"),
        ({"p2_k": 0.0}, "p2_k is 0.0"),
        ({"p2_gamma": -1.0}, "p2_gamma is -1.0, want 0 or more"),
        ({"p2_gamma": float("nan")}, "p2_gamma is nan, want 0 or more, and finite"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        LossWeight(**settings)
