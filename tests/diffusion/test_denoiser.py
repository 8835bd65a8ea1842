import pytest
import torch

from maskdm_fast.diffusion import Denoiser, EDMSchedule, FlowSchedule, Guidance, VPSchedule, cosine_schedule
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


def test_edm_is_the_preconditioned_network():
    """D(x, s) = c_skip x + c_out F(c_in x, c_noise), in the variables of the paper."""
    level, x = torch.tensor([0.01, 0.7, 30.0], dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    s, sigma_data, given = level[:, None, None], 0.5, []

    def network(tokens, t, ids_keep, labels):
        given.append(t)
        return torch.tanh(3 * tokens)

    c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s * sigma_data / (s**2 + sigma_data**2).sqrt()
    c_in = 1 / (s**2 + sigma_data**2).sqrt()
    want = c_skip * x + c_out * torch.tanh(3 * c_in * x)
    torch.testing.assert_close(Denoiser(network, EDMSchedule())(c_in * x, level), want)
    torch.testing.assert_close(given[0], 400 * (level.log() / 4))


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, VPSchedule(), FlowSchedule(), EDMSchedule()], ids=lambda s: type(s).__name__
)
def test_one_level_at_a_time_is_the_same(schedule):
    model = UViT(UViTConfig(image_size=8, patch_size=4, dim=16, depth=1, num_heads=1, num_classes=3))
    xt, labels = torch.randn(2, 4, 48), torch.tensor([0, 2])
    for prediction in (None, *schedule.predictions):
        denoiser = Denoiser(model, schedule, prediction)
        times = schedule.sampling_times(4)[1:]
        for guidance in (Guidance(), Guidance(2.5), Guidance(2.5, (0.5, 1.5))):
            for level, t in zip(denoiser.levels(times, guidance), times, strict=True):
                want = denoiser(xt, torch.tensor([t, t]), labels, guidance)
                torch.testing.assert_close(denoiser.at(level, xt, labels), want, rtol=1e-4, atol=1e-4)


def test_guidance_of_each_image_by_its_own_level():
    def network(tokens, t, ids_keep, labels):
        return torch.where(labels == 1, 0.5, -0.25)[:, None, None].expand_as(tokens)

    denoiser, labels = Denoiser(network, FlowSchedule(), "x0"), torch.tensor([1, 1, 1, -1])
    t = torch.tensor([0.1, 0.5, 1.0, 0.5])  # sigma/alpha of 1/9, 1, infinity, 1
    x0 = denoiser(torch.zeros(4, 1, 1), t, labels, Guidance(3.0, (0.5, 2.0)))
    assert x0.flatten().tolist() == [0.5, 2.0, 0.5, -0.25]
    with pytest.raises(ValueError, match="guidance needs labels"):
        denoiser(torch.zeros(4, 1, 1), t, None, Guidance(3.0))


def test_gradients_reach_the_tokens_and_the_network():
    model = UViT(UViTConfig(image_size=8, patch_size=4, dim=16, depth=1, num_heads=1, num_classes=3))
    xt = torch.randn(2, 4, 48, requires_grad=True)
    x0 = Denoiser(model, VPSchedule())(xt, torch.tensor([0.3, 0.6]), torch.tensor([0, 1]), Guidance(2.0))
    x0.square().sum().backward()
    assert xt.grad.abs().min() > 0 and model.head.weight.grad.abs().max() > 0


def test_predictions_that_do_not_fit():
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        Denoiser(torch.nn.Identity(), SCHEDULE, "score")
    for schedule, prediction in [
        (SCHEDULE, "edm"),
        (SCHEDULE, "flow"),
        (FlowSchedule(), "eps"),
        (EDMSchedule(), "eps"),
    ]:
        with pytest.raises(
            ValueError, match=f"prediction '{prediction}' does not go with {type(schedule).__name__}, want"
        ):
            Denoiser(torch.nn.Identity(), schedule, prediction)
    assert Denoiser(torch.nn.Identity(), FlowSchedule()).prediction == "flow"
