import math

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import (
    Denoiser,
    cosine_schedule,
    linear_schedule,
    make_schedule,
    make_transitions,
    sample,
    unpatchify,
)
from maskdm_fast.diffusion.prediction import x0_coefficients
from maskdm_fast.diffusion.schedule import SCHEDULES
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.random import Stream

SHAPE = {"image_size": 4, "channels": 1, "patch_size": 2}
ARGUMENTS = {"num_images": 3, **SHAPE, "num_steps": 10, "seed": 0, "batch_size": 8, "as_float": True, "clip": False}


def to_images(tokens):
    return unpatchify(tokens, 2, 4, 4, 1).permute(0, 2, 3, 1)


def generate(schedule, network=lambda tokens, t, ids_keep, labels: 0.3 * tokens, **changes):
    return sample(Denoiser(network, schedule, "x0"), **(ARGUMENTS | changes))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_samplers_without_noise_are_their_analytic_map(gaussian, name, sampler):
    schedule = make_schedule(name, 128)
    x_T = random.normal(16, seed=0, stream=Stream.GENERATOR_NOISE, step=0, slots=torch.arange(3)).view(3, 4, 4)
    for prediction in schedule.predictions:
        denoiser = Denoiser(gaussian.Network(name, prediction), schedule, prediction)
        for num_steps in (1, 4, 20):
            slope, shift, _ = gaussian.chain(schedule, make_transitions(schedule, sampler, num_steps))
            images = sample(denoiser, **(ARGUMENTS | {"sampler": sampler, "num_steps": num_steps}))
            # The rounding of the network's output, amplified by up to 4e4 where it predicts eps.
            scales = schedule.alpha_sigma(torch.tensor(schedule.sampling_times(1)))
            tolerance = 1e-4 + 2.0**-22 * x0_coefficients(prediction, *scales)[1].abs().item()
            torch.testing.assert_close(images, to_images(slope * x_T + shift).float(), rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "sampler", "eta", "num_steps"),
    [
        ("linear", "ddim", 1.0, 100),
        ("cosine", "ddim", 0.5, 20),
        ("cosine", "ddim", 1.0, 2),
        ("linear", "ddpm", None, 100),
        ("cosine", "ddpm", None, 5),
        ("flow", "ddpm", None, 10),
        ("edm", "ddim", 0.7, 10),
    ],
)
def test_noisy_samplers_agree_in_distribution(gaussian, name, sampler, eta, num_steps):
    schedule, num = make_schedule(name, 128), 4000
    slope, shift, var = gaussian.chain(schedule, make_transitions(schedule, sampler, num_steps, eta))
    std = (slope**2 + var).sqrt()
    images = generate(
        schedule, gaussian.Network(name), num_images=num, batch_size=num, sampler=sampler, eta=eta, num_steps=num_steps,
        seed=5,
    ).double()  # fmt: skip
    z = (images - to_images(shift[None])) / to_images(std[None])  # standard normal if all is right
    # Mean and std of n standard normal draws have standard errors 1/sqrt(n) and 1/sqrt(2n).
    assert z.mean(dim=0).abs().max() < 4.5 * num**-0.5
    assert (z.std(dim=0) - 1).abs().max() < 4.5 * (2 * num) ** -0.5
    assert (torch.corrcoef(z.flatten(1).T) - torch.eye(16)).abs().max() < 5 * num**-0.5


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
    eps = ((1 - a).sqrt() * x_T - a.sqrt()) / (1 - a).sqrt()
    torch.testing.assert_close(seen[1], (b.sqrt() + (1 - b).sqrt() * eps).float())
    assert (generate(schedule, network, num_steps=num_steps, clip=True, bound=1.5) == 1.5).all()


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


@pytest.mark.parametrize(
    ("sampler", "eta", "evaluations"),
    [
        ("ddim", 0.0, 4),
        ("ddim", 1.0, 4),
        ("ddpm", None, 4),
        ("euler", None, 4),
        ("dpmpp_2m", None, 4),
        ("heun", None, 7),
    ],
)
def test_result_does_not_depend_on_the_batch_size(sampler, eta, evaluations):
    model, labels = TinyNetwork(), torch.tensor([0, 1, 2, -1, 0, 1, 2])
    arguments = {"network": model, "num_steps": 4, "sampler": sampler, "eta": eta, "clip": True}
    whole = generate(cosine_schedule(), num_images=7, labels=labels, batch_size=7, **arguments)
    first_input = model.calls[0][0]
    for batch_size in (1, 3, 100):
        model.calls.clear()
        images = generate(cosine_schedule(), num_images=7, labels=labels, batch_size=batch_size, **arguments)
        torch.testing.assert_close(images, whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat([tokens for tokens, _, _ in model.calls[::evaluations]]), first_input)
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


def test_transitions_of_the_callers_choice():
    schedule = cosine_schedule()
    named = generate(schedule, num_steps=3, eta=0.5)
    given = generate(schedule, num_steps=None, transitions=make_transitions(schedule, "ddim", 3, 0.5))
    assert torch.equal(given, named)


def test_progress_counts_evaluations():
    calls = []
    generate(linear_schedule(), num_images=5, batch_size=2, num_steps=3, progress=lambda *args: calls.append(args))
    assert calls == [(done, 9) for done in range(1, 10)]
    calls.clear()
    generate(
        linear_schedule(), num_images=5, batch_size=3, num_steps=3, sampler="heun",
        progress=lambda *args: calls.append(args),
    )  # fmt: skip
    assert calls == [(done, 10) for done in range(1, 11)]


class GuidedNetwork:
    """Says +0.5 for class 1, -0.25 for none; keeps how often it was asked."""

    def __init__(self):
        self.batches = []

    def __call__(self, tokens, t, ids_keep, labels):
        self.batches.append(len(tokens))
        return torch.where(labels == 1, 0.5, -0.25)[:, None, None].expand_as(tokens)


@pytest.mark.parametrize(("guidance", "value"), [(1.0, 0.5), (0.0, -0.25), (2.0, 1.25)])
def test_guidance(guidance, value):
    model = GuidedNetwork()
    images = generate(linear_schedule(), model, labels=torch.ones(3, dtype=torch.int64), guidance=guidance)
    torch.testing.assert_close(images, torch.full_like(images, value))
    assert model.batches == [3 if guidance == 1.0 else 6] * 10


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -2.0])
def test_a_guidance_that_is_no_scale(guidance):
    """NaN made black images of all."""
    with pytest.raises(ValueError, match=f"guidance is {guidance}, want a number of 0 or more"):
        generate(linear_schedule(), None, labels=torch.ones(3, dtype=torch.int64), guidance=guidance)


def test_guidance_on_an_interval_asks_twice_there_alone():
    model, schedule = GuidedNetwork(), linear_schedule()
    levels = (-0.5 * schedule.log_snr(torch.tensor(schedule.sampling_times(10)))).exp()
    interval = (levels[6].item(), levels[3].item() * 1.001)
    images = generate(
        schedule, model, labels=torch.ones(3, dtype=torch.int64), guidance=3.0, guidance_interval=interval
    )
    assert model.batches == [3, 3, 3, 6, 6, 6, 6, 3, 3, 3]
    torch.testing.assert_close(images, torch.full_like(images, 0.5))  # the last step is not guided
    with pytest.raises(ValueError, match="guidance needs labels"):
        generate(schedule, model, guidance=2.0)
    with pytest.raises(ValueError, match=r"guidance interval is \(2.0, 1.0\), want 0 <= lowest < highest"):
        generate(schedule, model, labels=torch.ones(3, dtype=torch.int64), guidance=2.0, guidance_interval=(2.0, 1.0))


def test_time_tokens_are_made_once():
    class Counting(TinyNetwork):
        asked = 0

        def time_tokens(self, t):
            self.asked += 1
            return super().time_tokens(t)

    model = Counting()
    labels = torch.tensor([0, 1, 2])
    arguments = {"num_steps": 5, "batch_size": 2, "labels": labels, "guidance": 2.0}
    ready = generate(cosine_schedule(), model, **arguments)
    assert model.asked == 1
    plain = generate(cosine_schedule(), lambda *args: model(*args), **arguments)
    assert model.asked == 1 + 2 * 5
    torch.testing.assert_close(ready, plain)


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
        ({"sampler": "plms"}, "unknown sampler 'plms', want one of ddim, ddpm"),
        ({"sampler": "ddpm", "eta": 1.0}, "sampler 'ddpm' has none; leave it None or choose 'ddim'"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels has shape \[2\], want \[3\]"),
        ({"first_slot": -1}, "first_slot is -1"),
        ({"num_steps": None}, "num_steps is None, want the steps of the sampler, or transitions"),
        ({"transitions": make_transitions(linear_schedule(), "ddim", 2)}, "num_steps and eta left at None"),
        ({"transitions": [], "num_steps": None}, "transitions want at least one step"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(linear_schedule(), **changes)
