import pytest
import torch

from maskdm_fast.diffusion import NoiseSchedule, cosine_schedule, linear_schedule, make_schedule


@pytest.mark.parametrize(
    ("name", "anchors"),
    [
        ("linear", {0: (0.9999, 1e-12), 499: (0.0786, 5e-5), 999: (4.04e-5, 5e-8)}),
        ("cosine", {0: (0.99996, 5e-6), 499: (0.494, 5e-4), 999: (2.4e-9, 5e-11)}),
    ],
)
def test_anchors(name, anchors):
    alpha_bar = make_schedule(name).alpha_bar
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (1000,)
    for t, (value, tolerance) in anchors.items():
        assert alpha_bar[t].item() == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
def test_alpha_sigma_are_correctly_rounded(make):
    schedule = make()
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000).view(10, 100))
    assert alpha.shape == sigma.shape == (10, 100)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert torch.equal(alpha.flatten(), schedule.alpha_bar.sqrt().float())
    assert torch.equal(sigma.flatten(), (1 - schedule.alpha_bar).sqrt().float())


def test_linear_is_rescaled_to_other_lengths():
    # Half as many steps, each twice as noisy: about the same end.
    assert linear_schedule(500).alpha_bar[-1].log().item() == pytest.approx(
        linear_schedule().alpha_bar[-1].log().item(), rel=0.02
    )


def test_cosine_takes_any_length():
    for num_timesteps in (1, 2, 10):
        assert cosine_schedule(num_timesteps).num_timesteps == num_timesteps


def test_errors():
    with pytest.raises(ValueError, match="unknown noise schedule 'sigmoid', want one of linear, cosine"):
        make_schedule("sigmoid")
    with pytest.raises(ValueError, match="num_timesteps is 20, want more than 20"):
        linear_schedule(20)
    with pytest.raises(ValueError, match="num_timesteps is 0"):
        cosine_schedule(0)
    with pytest.raises(TypeError, match=r"alpha_bar is torch\.float32, want torch\.float64"):
        NoiseSchedule(torch.tensor([0.5]))
    for values in ([0.5, 0.6], [1.0, 0.5], [0.5, 0.0], [0.5, 0.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="strictly decrease"):
            NoiseSchedule(torch.tensor(values, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"alpha_bar has shape \[0\]"):
        NoiseSchedule(torch.zeros(0, dtype=torch.float64))
