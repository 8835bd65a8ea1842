import pytest
import torch

from maskdm_fast.diffusion import Denoiser, cosine_schedule
from maskdm_fast.models import UViT, UViTConfig

SCHEDULE = cosine_schedule()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_x0_and_eps_belong_together(prediction):
    xt, t = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([0, 500, 900])
    denoiser = Denoiser(lambda tokens, t, ids_keep, labels: 0.3 * tokens, SCHEDULE, prediction)
    x0, eps = denoiser(xt, t), denoiser.eps(xt, t)
    alpha, sigma = (scale.double()[:, None, None] for scale in SCHEDULE.alpha_sigma(t))
    torch.testing.assert_close({"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction], 0.3 * xt)
    # alpha and sigma are rounded to float32, so the identity holds to its precision, divided by the smallest sigma.
    torch.testing.assert_close(alpha * x0 + sigma * eps, xt, rtol=1e-5, atol=1e-5)


def test_runs_the_network_on_all_tokens_and_keeps_the_dtype():
    model = UViT(UViTConfig(image_size=8, patch_size=4, dim=16, depth=1, num_heads=1, num_classes=3))
    denoiser = Denoiser(model, SCHEDULE)
    assert denoiser.device == torch.device("cpu")
    xt, t = torch.randn(2, 4, 48), torch.tensor([10, 20])
    unconditional, conditional = denoiser(xt, t), denoiser(xt, t, torch.tensor([0, 2]))
    assert not torch.equal(unconditional, conditional)
    torch.testing.assert_close(denoiser(xt, t, torch.tensor([-1, -1])), unconditional)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser(xt, t).dtype == torch.float32


def test_device_is_that_of_the_parameters():
    with torch.device("meta"):
        model = torch.nn.Linear(1, 1)
    assert Denoiser(model, SCHEDULE).device == torch.device("meta")
    assert Denoiser(torch.nn.Identity(), SCHEDULE).device == torch.device("cpu")


def test_unknown_prediction():
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        Denoiser(torch.nn.Identity(), SCHEDULE, "score")
