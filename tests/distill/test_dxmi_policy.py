"""Policies from teachers: published numbers of their schedules, closed forms of their steps, and value guidance."""

import math

import pytest
import torch

from maskdm_fast.diffusion import Denoiser, make_schedule
from maskdm_fast.diffusion.prediction import coefficients
from maskdm_fast.diffusion.schedule import SCHEDULES
from maskdm_fast.distill import DxMIConfig
from maskdm_fast.distill import generate as generate_images
from maskdm_fast.distill.dxmi_policy import (
    DenoiserMean,
    GaussianPolicy,
    LogSigmas,
    PolicyGenerator,
    ddpm_policy,
    fastdpm_alpha_bars,
    generate,
    join_policy,
    make_policy,
    ve_policy,
)
from maskdm_fast.distill.dxmi_rollout import draw, rollout
from maskdm_fast.models import UViT, UViTConfig

STD = 0.6
TIME_OF_INPUT = {
    "scaled-linear": lambda t: t - 1,
    "vp": lambda t: t / 999,
    "flow": lambda t: t / 1000,
    "edm": lambda t: torch.exp(t / 100),
}


class GaussianNetwork(torch.nn.Module):
    """The exact denoiser of values N(0, STD^2), as a network that predicts what it is told to."""

    def __init__(self, name, prediction):
        super().__init__()
        self.name, self.prediction, self.schedule = name, prediction, make_schedule(name, 128)

    def forward(self, tokens, t, ids_keep=None, labels=None):
        t = TIME_OF_INPUT.get(self.name, lambda t: t)(t.double())
        alpha, sigma = (scale[:, None, None] for scale in self.schedule.alpha_sigma(t))
        x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * tokens
        eps_scale, x0_scale = coefficients(self.prediction, alpha, sigma)
        return eps_scale * (tokens - alpha * x0) / sigma + x0_scale * x0


def slopes(schedule, prediction, name, plan):
    """``mean / x`` of every step of the policy of the exact denoiser."""
    policy = make_policy(Denoiser(GaussianNetwork(name, prediction), schedule, prediction), plan)
    index = torch.arange(len(plan.steps))
    mean, log_sigma = policy(torch.ones(len(index), 1, 1, dtype=torch.float64), index)
    want = torch.tensor([step.std for step in plan.steps])
    torch.testing.assert_close(log_sigma.detach().exp(), want, rtol=1e-6, atol=0)
    return mean[:, 0, 0]


@pytest.mark.parametrize(
    ("num_steps", "times", "stds", "x_mult", "eps_mult"),
    [
        (
            10,
            [616.73, 493.98, 394.08, 308.87, 234.86, 170.30, 114.36, 66.87, 28.29, 0],
            [0.8372, 0.7177, 0.5987, 0.4847, 0.3773, 0.2765, 0.1819, 0.0937, 0.0100, 0.001],
            [1.9929, 1.5673, 1.3553, 1.2276, 1.1435, 1.0860, 1.0466, 1.0206, 1.0056, 1.0000],
            [-1.5069, -0.9702, -0.6917, -0.5215, -0.4064, -0.3208, -0.2495, -0.1813, -0.1051, -0.0100],
        ),
        (
            4,
            [321.87, 176.86, 74.32, 0],
            [0.4735, 0.2262, 0.0100, 0.001],
            [1.4464, 1.1435, 1.0321, 1.0],
            [-0.9316, -0.5064, -0.2553, -0.01],
        ),
    ],
)
def test_ddpm_steps_are_those_of_fastdpm(num_steps, times, stds, x_mult, eps_mult):
    """As ``mean = x_mult x + eps_mult eps``, with ``x0 = (x - sqrt(1 - a) eps) / sqrt(a)``."""
    plan = ddpm_policy(make_schedule("linear"), num_steps)
    alpha_bars = fastdpm_alpha_bars(num_steps, 4.04e-5)
    assert [step.t for step in plan.steps] == pytest.approx(times, abs=0.05)  # theirs come from Stirling's formula
    assert [step.std for step in plan.steps] == pytest.approx(stds, abs=6e-5)
    for step, a, on_x, on_eps in zip(plan.steps, alpha_bars, x_mult, eps_mult, strict=True):
        assert step.c_xt + step.c_x0 / math.sqrt(a) == pytest.approx(on_x, abs=6e-5)
        assert -step.c_x0 * math.sqrt((1 - a) / a) == pytest.approx(on_eps, abs=6e-5)
        assert step.scale == pytest.approx(1.0, abs=1e-6)
    assert plan.start_std == 1.0


def test_fastdpm_levels():
    want = [0.9999, 0.988876, 0.949321, 0.866706, 0.73488, 0.562018, 0.372955, 0.203027, 0.082652, 0.02081]
    assert fastdpm_alpha_bars(10, 4.04e-5)[::-1] == pytest.approx(want, abs=6e-6)
    assert fastdpm_alpha_bars(4, 0.0)[0] == pytest.approx(0.343, abs=5e-4)
    many = fastdpm_alpha_bars(50, 4.04e-5)  # here the limit does not hold, and the end is reached
    assert many[0] == pytest.approx(4.04e-5, rel=1e-9)
    assert many[-1] == pytest.approx(0.9999)


@pytest.mark.parametrize(
    ("num_steps", "options", "levels", "stds"),
    [
        (
            10,
            {},
            [80, 42.415, 21.109, 9.723, 4.066, 1.502, 0.470, 0.1166, 0.0204, 0.002, 0],
            [35.963, 18.309, 8.630, 3.694, 1.396, 0.446, 0.113, 0.0201, 0.002, 0.001],
        ),
        (4, {"rho": 4.0, "stochastic_last": True}, [80, 27.785, 6.571, 0.6746, 0.002], [26.055, 6.385, 0.671, 0.002]),
    ],
)
def test_ve_steps_are_the_published_ones(num_steps, options, levels, stds):
    plan = ve_policy(make_schedule("edm"), num_steps, **options)
    assert plan.start_std == pytest.approx(80.0)
    assert [step.t for step in plan.steps] == pytest.approx(levels[:-1], rel=5e-3)
    assert [step.std for step in plan.steps] == pytest.approx(stds, rel=5e-3)
    for step, level, after in zip(plan.steps, levels, levels[1:], strict=False):
        assert step.c_xt == pytest.approx((after / level) ** 2, rel=2e-2)
        assert step.c_x0 == pytest.approx(1.0 - step.c_xt)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_ancestral_steps_do_to_gaussian_data(name):
    """The variance after a step misses that of the next level by the spread of x0 given x, for every teacher."""
    schedule = make_schedule(name, 128)
    for prediction in schedule.predictions:
        alpha_bars = [0.05, 0.3, 0.7, 0.9]
        plan = ddpm_policy(schedule, alpha_bars=alpha_bars)
        for slope, step, a, after in zip(
            slopes(schedule, prediction, name, plan), plan.steps, alpha_bars, [*alpha_bars[1:], 1.0], strict=True
        ):
            before = a * STD**2 + 1 - a
            spread = STD**2 * (1 - a) / before
            miss = (math.sqrt(after) * (1 - a / after) / (1 - a)) ** 2 * spread
            added = (1 - after) / (1 - a) * (1 - a / after)  # the last step adds the least noise there is instead of 0
            have = slope.item() ** 2 * before + added
            assert have + miss == pytest.approx(after * STD**2 + 1 - after, abs=1e-5)
            assert step.std == pytest.approx(max(math.sqrt(added), 1e-3))
        plan = ve_policy(schedule, 4, noise_range=(0.05, 5.0))
        levels = [step.std for step in plan.steps]
        level = plan.start_std
        for slope, step in zip(slopes(schedule, prediction, name, plan), plan.steps, strict=True):
            ratio, after = step.c_xt, level * math.sqrt(step.c_xt)
            have = slope.item() ** 2 * (STD**2 + level**2) + after**2 * (1 - ratio)
            miss = (1 - ratio) ** 2 * STD**2 * level**2 / (STD**2 + level**2)
            assert have + miss == pytest.approx(STD**2 + after**2, rel=1e-5)
            level = after
        assert level == 0
        assert levels[-1] == 1e-3


def test_beta_noise():
    """The other variance of DDPM; the means are the same."""
    schedule, alpha_bars = make_schedule("linear"), [0.2, 0.6, 0.95]
    posterior, beta = (ddpm_policy(schedule, alpha_bars=alpha_bars, std=std) for std in ("posterior", "beta"))
    assert [step.std for step in beta.steps] == pytest.approx(
        [math.sqrt(1 - a / b) for a, b in [(0.2, 0.6), (0.6, 0.95), (0.95, 1.0)]]
    )
    for first, second in zip(posterior.steps, beta.steps, strict=True):
        assert (first.t, first.c_x0, first.c_xt) == (second.t, second.c_x0, second.c_xt)


def test_a_uvit_as_policy():
    """The mean is the denoiser's, gradients reach its network, and images of one batch may be at different steps."""
    config = UViTConfig(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2, num_classes=3)
    denoiser = Denoiser(UViT(config), make_schedule("linear"))
    plan = ddpm_policy(denoiser.schedule, 4)
    policy = make_policy(denoiser, plan)
    x = torch.linspace(-1, 1, 3 * 4 * 48).view(3, 4, 48)
    index, labels = torch.tensor([2, 0, 3]), torch.tensor([0, 2, -1])
    mean, log_sigma = policy(x, index, labels)
    for image, (t, label) in enumerate(zip(index.tolist(), labels, strict=True)):
        step = plan.steps[t]
        one = x[image : image + 1]
        x0 = denoiser(step.scale * one, torch.tensor([step.t]), label[None])
        want = step.c_x0 * x0 + step.c_xt * one
        torch.testing.assert_close(mean[image : image + 1], want, rtol=1e-4, atol=1e-4)
        assert log_sigma[image].exp().item() == pytest.approx(step.std, rel=1e-5)
    mean.sum().backward()
    assert all(parameter.grad is not None for name, parameter in policy.named_parameters() if "network" in name)
    assert policy.log_sigma.grad is None
    assert dict(policy.named_parameters()).keys() >= {"log_sigma", "mean.network.head.weight"}
    assert policy.log_sigma.shape == (3,)
    assert policy.fixed_log_sigma.exp().item() == pytest.approx(1e-3)


def test_half_precision_weights_leave_the_schedule_alone():
    config = UViTConfig(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2)
    denoiser = Denoiser(UViT(config), make_schedule("linear"))
    policy = make_policy(denoiser, ddpm_policy(denoiser.schedule, 10))
    x, index = torch.linspace(-1, 1, 10 * 4 * 48).view(10, 4, 48), torch.arange(10)
    seen = []
    policy.mean.network.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    policy(x, index)
    policy.to(torch.bfloat16)
    mean, _ = policy(x, index)
    assert mean.dtype == torch.float32
    assert all(torch.equal(before, after) for before, after in zip(*seen, strict=True))


class Constant(torch.nn.Module):
    def forward(self, x, index, labels=None):
        return 0.5 * x


def test_generation_and_its_guidance():
    policy = GaussianPolicy(Constant(), [0.5, 0.2])
    start, noise = torch.ones(3, 2), torch.linspace(-1, 1, 12).view(2, 3, 2)
    plain = generate(policy, start, noise)
    torch.testing.assert_close(plain, 0.5 * (0.5 * start + 0.5 * noise[0]) + 0.2 * noise[1])
    asked = []

    def value(x, index):
        asked.append(index[0].item())
        return 0.5 * x.square().sum(1)

    guided = generate(policy, start, noise, value=value, value_guidance=0.4)
    first = (0.5 * start + 0.5 * noise[0]) * (1 - 0.4 * 0.5)
    torch.testing.assert_close(guided, (0.5 * first + 0.2 * noise[1]) * (1 - 0.4 * 0.2))
    assert asked == [1, 2]
    assert value(guided, torch.tensor([2])).sum() < value(plain, torch.tensor([2])).sum()
    assert not guided.requires_grad
    with pytest.raises(ValueError, match="value_guidance"):
        generate(policy, start, noise, value_guidance=0.1)
    for wrong in (-0.4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="want 0 or more"):
            generate(policy, start, noise, value=value, value_guidance=wrong)


def test_a_policy_in_parts_makes_the_images_of_its_rollouts():
    """Mean and sigmas that are kept apart; images of any batch and slot; what training draws is what is sampled."""
    config = UViTConfig(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2, num_classes=3)
    denoiser = Denoiser(UViT(config), make_schedule("linear"))
    plan = ve_policy(denoiser.schedule, 3, noise_range=(0.1, 2.0))
    sigmas = LogSigmas([step.std for step in plan.steps])
    parts = join_policy(DenoiserMean(denoiser, plan), sigmas)
    shape, labels, slots = (4, 48), torch.tensor([0, 2, 1, 0]), torch.arange(5, 9)
    draws = draw(DxMIConfig(num_steps=3), shape, seed=2, step=0, slots=slots)
    start = plan.start_std * draws.start
    assert start.std() > 1.9
    want = rollout(make_policy(denoiser, plan), start, draws.rollout, labels).states[-1]
    generator = PolicyGenerator(denoiser, parts, plan.start_std, 3, shape)
    assert torch.equal(generator(labels, seed=2, step=0, slots=slots), want)
    common = {"image_size": 8, "channels": 3, "patch_size": 4, "seed": 2, "batch_size": 3, "as_float": True}
    images = generate_images(generator, num_images=4, first_slot=5, labels=labels, **common)
    patches = images.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3).reshape(4, 4, 48)
    torch.testing.assert_close(patches, want.detach(), rtol=1e-4, atol=1e-5)


def test_wrong_arguments():
    schedule = make_schedule("linear")
    for call in (
        lambda: fastdpm_alpha_bars(0, 0.1),
        lambda: fastdpm_alpha_bars(4, 1.0),
        lambda: ddpm_policy(schedule),
        lambda: ddpm_policy(schedule, 4, alpha_bars=[0.1]),
        lambda: ddpm_policy(schedule, alpha_bars=[0.5, 0.2]),
        lambda: ddpm_policy(schedule, 4, std="none"),
        lambda: ve_policy(schedule, 4, noise_range=(1.0, 0.5)),
        lambda: ve_policy(schedule, 0),
        lambda: GaussianPolicy(Constant(), []),
        lambda: GaussianPolicy(Constant(), [0.0]),
        lambda: GaussianPolicy(Constant(), [0.1], num_fixed=2),
        lambda: LogSigmas([0.1], num_fixed=-1),
    ):
        with pytest.raises(ValueError, match="want"):
            call()
