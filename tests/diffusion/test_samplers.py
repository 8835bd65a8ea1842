import itertools
import math

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import (
    Denoiser,
    cosine_schedule,
    ddim_transitions,
    ddpm_transitions,
    linear_schedule,
    make_schedule,
    sample,
    sampling_times,
    unpatchify,
)
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.random import Stream

SHAPE = {"image_size": 4, "channels": 1, "patch_size": 2}
MEAN = torch.linspace(-0.6, 0.6, 16, dtype=torch.float64).view(4, 4)  # of each value of the tokens [N, P*P*C]
STD = torch.linspace(0.1, 0.5, 16, dtype=torch.float64).view(4, 4)


class GaussianNetwork:
    """The exact denoiser of independent values N(MEAN, STD^2), as a network that predicts x0:

    E[x0 | xt] = m + gain (xt - alpha m),    gain = alpha s^2 / (alpha^2 s^2 + sigma^2)
    """

    def __init__(self, schedule):
        self.alpha_bar = schedule.alpha_bar

    def gain(self, t):
        a = self.alpha_bar[t]
        return a.sqrt() * STD**2 / (a * STD**2 + 1 - a)

    def __call__(self, tokens, t, ids_keep, labels):
        assert ids_keep is None
        t = t[0]
        return (MEAN + self.gain(t) * (tokens - self.alpha_bar[t].sqrt() * MEAN)).float()


def chain(schedule, transitions):
    """What the sampler does to x_T under the exact denoiser: ``x = slope x_T + shift + N(0, var)``, in float64."""
    network = GaussianNetwork(schedule)
    slope, shift, var = torch.ones_like(MEAN), torch.zeros_like(MEAN), torch.zeros_like(MEAN)
    for step in transitions:
        gain = network.gain(step.t)
        factor = step.c_x0 * gain + step.c_xt
        shift = factor * shift + step.c_x0 * (1 - gain * schedule.alpha_bar[step.t].sqrt()) * MEAN
        slope, var = factor * slope, factor**2 * var + step.std**2
    return slope, shift, var


def to_images(tokens):
    return unpatchify(tokens, 2, 4, 4, 1).permute(0, 2, 3, 1)


def generate(schedule, network=None, **changes):
    arguments = {"num_images": 3, **SHAPE, "num_steps": 10, "seed": 0, "batch_size": 8, "as_float": True, "clip": False}
    return sample(Denoiser(network or GaussianNetwork(schedule), schedule, "x0"), **(arguments | changes))


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50, 1000])
def test_ddim_without_noise_is_the_analytic_map(name, num_steps):
    schedule = make_schedule(name)
    slope, shift, _ = chain(schedule, ddim_transitions(schedule, num_steps, 0.0))
    x_T = random.normal(16, seed=0, stream=Stream.GENERATOR_NOISE, step=0, slots=torch.arange(3)).view(3, 4, 4)
    expected = to_images(slope * x_T + shift).float()
    torch.testing.assert_close(generate(schedule, num_steps=num_steps), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_many_steps_transport_to_the_gaussian(name, eta):
    """The chain of discrete steps ends in the data's distribution, up to an error of first order in the step width."""
    schedule = make_schedule(name)
    errors = []
    for num_steps in (100, 1000):
        slope, shift, var = chain(schedule, ddim_transitions(schedule, num_steps, eta))
        errors.append(((slope**2 + var).sqrt() / STD - 1).abs().max())  # x_T is N(0, 1)
        # What x_T misses of the mean, alpha_T m, can only shrink on the way.
        assert (shift - MEAN).abs().max() < schedule.alpha_bar[-1].sqrt() * MEAN.abs().max()
    assert errors[1] < 0.04
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize(
    ("name", "sampler", "eta", "num_steps"),
    [
        ("linear", "ddim", 1.0, 100),
        ("cosine", "ddim", 0.5, 20),
        ("cosine", "ddim", 1.0, 2),
        ("linear", "ddpm", None, 100),
        ("cosine", "ddpm", None, 5),
    ],
)
def test_noisy_samplers_agree_in_distribution(name, sampler, eta, num_steps):
    schedule, num = make_schedule(name), 4000
    transitions = ddpm_transitions(schedule, num_steps) if eta is None else ddim_transitions(schedule, num_steps, eta)
    slope, shift, var = chain(schedule, transitions)
    std = (slope**2 + var).sqrt()
    images = generate(
        schedule, num_images=num, batch_size=num, sampler=sampler, eta=eta, num_steps=num_steps, seed=5
    ).double()
    z = (images - to_images(shift[None])) / to_images(std[None])  # standard normal if all is right
    # Mean and std of n standard normal draws have standard errors 1/sqrt(n) and 1/sqrt(2n).
    assert z.mean(dim=0).abs().max() < 4.5 * num**-0.5
    assert (z.std(dim=0) - 1).abs().max() < 4.5 * (2 * num) ** -0.5
    assert (torch.corrcoef(z.flatten(1).T) - torch.eye(16)).abs().max() < 5 * num**-0.5


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50, 999, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_transitions_keep_the_marginals(name, num_steps, eta):
    """If x_t is N(sqrt(a) x0, 1 - a), then x_s is N(sqrt(b) x0, 1 - b): the defining property, for any step width."""
    schedule = make_schedule(name)
    alpha_bar = [*schedule.alpha_bar.tolist(), 1.0]
    transitions = ddim_transitions(schedule, num_steps, eta)
    assert len(transitions) == num_steps and transitions[0].t == 999
    for step, s in zip(transitions, [step.t for step in transitions[1:]] + [-1], strict=True):
        a, b = alpha_bar[step.t], alpha_bar[s]
        assert step.c_x0 + step.c_xt * math.sqrt(a) == pytest.approx(math.sqrt(b), rel=1e-12)
        assert step.c_xt**2 * (1 - a) + step.std**2 == pytest.approx(1 - b, rel=1e-9, abs=1e-15)
        # The paper's form of the noise, and no noise for eta = 0.
        assert step.std == pytest.approx(eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b), rel=1e-9)
    assert (transitions[-1].c_x0, transitions[-1].c_xt, transitions[-1].std) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 5, 1000])
def test_ddpm_is_ddim_with_all_the_noise(name, num_steps):
    schedule = make_schedule(name)
    for ddpm, ddim in zip(
        ddpm_transitions(schedule, num_steps), ddim_transitions(schedule, num_steps, 1.0), strict=True
    ):
        assert ddpm.t == ddim.t
        for field in ("c_x0", "c_xt", "std"):
            assert getattr(ddpm, field) == pytest.approx(getattr(ddim, field), rel=1e-9, abs=1e-14)


def test_one_step_of_ddpm_is_the_textbook_posterior():
    schedule = linear_schedule()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    for step in ddpm_transitions(schedule, 1000)[:-1]:
        t = step.t
        remaining = 1 - alpha_bar[t]
        assert step.c_x0 == pytest.approx((alpha_bar[t - 1].sqrt() * beta[t] / remaining).item(), rel=1e-9)
        assert step.c_xt == pytest.approx(((1 - beta[t]).sqrt() * (1 - alpha_bar[t - 1]) / remaining).item(), rel=1e-9)
        assert step.std**2 == pytest.approx((beta[t] * (1 - alpha_bar[t - 1]) / remaining).item(), rel=1e-9)


def test_sampling_times():
    assert sampling_times(1000, 1) == [999, -1]
    assert sampling_times(1000, 2) == [999, 499, -1]
    assert sampling_times(1000, 1000) == list(range(999, -2, -1))
    for num_steps in (3, 7, 250, 999):
        times = sampling_times(1000, num_steps)
        reference = torch.linspace(-1, 999, num_steps + 1, dtype=torch.float64).flip(0)
        assert len(times) == num_steps + 1 and times[0] == 999 and times[-1] == -1
        assert all(t > s for t, s in itertools.pairwise(times))
        # Floating point may fall to either side of an integer; the integers here do not.
        assert all(math.floor(r - 1e-9) <= t <= r + 1e-9 for t, r in zip(times, reference.tolist(), strict=True))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [2, 5, 1000])
def test_a_wild_network_gives_finite_images_when_clipped(num_steps, eta):
    schedule = cosine_schedule()
    images = sample(
        Denoiser(lambda tokens, t, ids_keep, labels: 3.0 * tokens, schedule),
        num_images=2, **SHAPE, num_steps=num_steps, eta=eta, seed=0, batch_size=2, as_float=True,
    )  # fmt: skip
    assert images.isfinite().all() and images.abs().max() <= 1.0


def test_clipping_re_derives_the_noise():
    schedule, num_steps = linear_schedule(), 2
    x_T = random.normal(16, seed=0, stream=Stream.GENERATOR_NOISE, step=0, slots=torch.arange(3)).view(3, 4, 4).double()
    a, b = schedule.alpha_bar[999], schedule.alpha_bar[499]
    seen = []

    def network(tokens, t, ids_keep, labels):
        seen.append(tokens)
        return torch.full_like(tokens, 2.0)

    assert (generate(schedule, network, num_steps=num_steps, clip=True) == 1.0).all()
    eps = (x_T - a.sqrt()) / (1 - a).sqrt()
    torch.testing.assert_close(seen[1], (b.sqrt() + (1 - b).sqrt() * eps).float())


def test_pixels_are_rounded_and_clamped():
    schedule = linear_schedule()
    for value, pixel in {-1.0: 0, 1.0: 255, 0.5: 191, 2 * 77 / 255 - 1: 77, -3.0: 0, 3.0: 255}.items():
        images = generate(schedule, lambda x, t, i, y, v=value: torch.full_like(x, v), num_steps=1, as_float=False)
        assert images.shape == (3, 4, 4, 1) and images.dtype == torch.uint8
        assert (images == pixel).all()


class TinyNetwork(UViT):
    def __init__(self):
        super().__init__(
            UViTConfig(image_size=4, patch_size=2, channels=1, dim=16, depth=3, num_heads=2, num_classes=3), seed=3
        )
        self.calls = []

    def forward(self, tokens, t, ids_keep=None, labels=None):
        self.calls.append((tokens, self.training, torch.is_inference_mode_enabled()))
        return super().forward(tokens, t, ids_keep, labels)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", None)])
def test_result_does_not_depend_on_the_batch_size(sampler, eta):
    model, labels = TinyNetwork(), torch.tensor([0, 1, 2, -1, 0, 1, 2])
    arguments = {"network": model, "num_steps": 4, "sampler": sampler, "eta": eta, "clip": True}
    whole = generate(cosine_schedule(), num_images=7, labels=labels, batch_size=7, **arguments)
    first_input = model.calls[0][0]
    for batch_size in (1, 3, 100):
        model.calls.clear()
        images = generate(cosine_schedule(), num_images=7, labels=labels, batch_size=batch_size, **arguments)
        torch.testing.assert_close(images, whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat([tokens for tokens, _, _ in model.calls[::4]]), first_input)
    tail = generate(cosine_schedule(), num_images=3, labels=labels[4:], first_slot=4, **arguments)
    torch.testing.assert_close(tail, whole[4:], rtol=1e-4, atol=1e-5)
    other = generate(cosine_schedule(), num_images=7, labels=labels, seed=1, **arguments)
    assert not torch.equal(other, whole)


def test_mode_of_the_network_is_set_and_restored():
    model = TinyNetwork()
    model.head.eval()
    generate(linear_schedule(), model, num_steps=2)
    assert all(not training and inference for _, training, inference in model.calls)
    assert model.training and model.mid_block.training and not model.head.training
    with pytest.raises(RuntimeError, match="stop"):
        generate(linear_schedule(), model, progress=lambda done, total: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model.training


def test_progress_counts_evaluations():
    calls = []
    generate(linear_schedule(), num_images=5, batch_size=2, num_steps=3, progress=lambda *args: calls.append(args))
    assert calls == [(done, 9) for done in range(1, 10)]


def test_global_generator_plays_no_part():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(linear_schedule(), eta=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(generate(linear_schedule(), eta=1.0), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "num_images is 0, want at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"image_size": 5}, "image_size is 5, want a multiple of patch_size 2"),
        ({"num_steps": 0}, "num_steps is 0, want 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001, want 1 to 1000"),
        ({"eta": 1.5}, "eta is 1.5, want 0"),
        ({"eta": -0.5}, "eta is -0.5"),
        ({"sampler": "euler"}, "unknown sampler 'euler', want one of ddim, ddpm"),
        ({"sampler": "ddpm", "eta": 1.0}, "sampler 'ddpm' has none; leave it None or choose 'ddim'"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels has shape \[2\], want \[3\]"),
        ({"first_slot": -1}, "first_slot is -1"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(linear_schedule(), **changes)
