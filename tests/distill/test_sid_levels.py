import math

import pytest
import torch

from maskdm_fast.diffusion import DiscreteSchedule, make_schedule
from maskdm_fast.distill import Alternation, LevelDraw, falling_levels, time_of_level
from maskdm_fast.random import Stream

SCHEDULES = ["linear", "cosine", "shifted-cosine", "vp", "flow", "edm"]
DRAW = {"seed": 3, "step": 5, "slots": torch.arange(4000)}


def levels_of(schedule, t):
    alpha, sigma = schedule.alpha_sigma(t.double() if t.is_floating_point() else t)
    return (sigma.double() / alpha.double()).tolist()


def stable_diffusion():
    """Betas from 8.5e-4 to 0.012, even in their square roots."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return DiscreteSchedule(torch.cumprod(1 - beta, 0))


@pytest.mark.parametrize(
    ("schedule", "level", "time", "within"),
    [
        (make_schedule("linear"), 2.5, 440, 0),
        (make_schedule("linear"), 24.4, 794, 1),
        (make_schedule("cosine"), 2.5, 755, 1),
        (stable_diffusion(), 2.5, 625, 0),
        (make_schedule("edm"), 2.5, 2.5, 1e-6),
        (make_schedule("flow"), 2.5, 2.5 / 3.5, 1e-6),
        (make_schedule("flow"), 24.4, 24.4 / 25.4, 1e-6),
    ],
    ids=["linear", "linear-24.4", "cosine", "stable-diffusion", "edm", "flow", "flow-24.4"],
)
def test_published_times_of_the_levels(schedule, level, time, within):
    assert abs(time_of_level(schedule, level) - time) <= within


def test_a_level_that_the_schedule_does_not_have():
    with pytest.raises(ValueError, match=r"sigma/alpha is 24.4, but DiscreteSchedule has those from 0.0292 to 14.6"):
        time_of_level(stable_diffusion(), 24.4)
    with pytest.raises(ValueError, match=r"noise levels from 20.0 to 40.0, but DiscreteSchedule has those"):
        LevelDraw("karras", 20.0, 40.0)(stable_diffusion(), **DRAW)


@pytest.mark.parametrize("kind", ["karras", "lognormal", "uniform"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_stay_in_their_range(kind, name):
    schedule = make_schedule(name, 64)
    draw = LevelDraw(kind, 0.05, 10.0)
    t = draw(schedule, **DRAW)
    assert t.dtype == (torch.float32 if schedule.num_timesteps is None else torch.int64)
    levels = levels_of(schedule, t)
    # A discrete schedule takes the nearest time, which may lie half a step outside: at 0.05 these are steps of 1/6.
    slack = 1.1 if schedule.num_timesteps is not None and kind != "uniform" else 1 + 1e-5
    assert 0.05 / slack <= min(levels) < 0.07 and 8.0 < max(levels) <= 10.0 * slack


def test_karras_is_that_of_the_code():
    """s = (80^(1/7) + (1 - u) (0.002^(1/7) - 80^(1/7)))^7 for u below 0.8: median 0.965, largest 24.41."""
    u = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    t = LevelDraw("karras").times(make_schedule("edm"), u)
    want = [(80 ** (1 / 7) + (1 - 0.8 * p) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for p in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(t.tolist(), want, rtol=1e-4, atol=0)
    assert want[1] == pytest.approx(0.965, abs=1e-3)


def test_lognormal_is_normal_within_its_range():
    levels = torch.tensor(
        levels_of(make_schedule("edm"), LevelDraw("lognormal", greatest=80.0)(make_schedule("edm"), **DRAW))
    )
    z = (levels.log() + 1.2) / 1.2
    assert abs(z.mean()) < 4 / math.sqrt(4000) and abs(z.std() - 1) < 4 / math.sqrt(8000)


@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "flow"])
def test_uniform_is_uniform_in_t(name):
    schedule = make_schedule(name)
    first, last = (time_of_level(schedule, level) for level in (0.5, 5.0))
    t = LevelDraw("uniform", 0.5, 5.0).times(schedule, torch.linspace(0.01, 0.99, 99, dtype=torch.float64)).double()
    place = (t - first) / (last - first)
    torch.testing.assert_close(place, torch.linspace(0.01, 0.99, 99, dtype=torch.float64), rtol=0, atol=0.005)


def test_whole_times_all_come_with_the_same_share():
    schedule = make_schedule("linear")
    first, last = time_of_level(schedule, 0.1), time_of_level(schedule, 0.2)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    least, greatest = (levels_of(schedule, torch.tensor([time]))[0] for time in (first, last))
    counts = LevelDraw("uniform", least, greatest).times(schedule, u).bincount()[first : last + 1]
    assert (counts - 10_000 / len(counts)).abs().max() <= 1


def test_streams_do_not_share_draws():
    schedule = make_schedule("edm")
    first = LevelDraw()(schedule, **DRAW)
    assert not torch.equal(first, LevelDraw()(schedule, stream=Stream.CRITIC_TIMESTEP, **DRAW))
    part = LevelDraw()(schedule, seed=3, step=5, slots=torch.arange(10, 20))
    assert torch.equal(part, first[10:20])


def test_expectation_of_the_weight_of_edm():
    """E[1/s^2] + 4 = exp(2.4 + 2.88) + 4 for the log-normal draw, of which its bounds take off 2 in 1000."""
    draw = LevelDraw("lognormal", 1e-6, 80.0)
    value = draw.expectation(LooseEDM(), lambda alpha, sigma: (alpha / sigma) ** 2 + 4)
    assert value == pytest.approx(math.exp(2.4 + 2 * 1.44) + 4, rel=0.03)


class LooseEDM(type(make_schedule("edm"))):
    noise_range = (1e-7, 80.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "even"}, "unknown draw of noise levels 'even', want one of karras, lognormal, uniform"),
        ({"least": 0.0}, "noise levels from 0.0 to 24.408, want 0 < least < greatest"),
        ({"std": 0.0}, "the std of the noise levels is 0.0, want more than 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LevelDraw(**arguments)


def test_falling_levels():
    assert falling_levels(2.5, 1) == (2.5,)
    assert falling_levels(2.0, 4) == (2.0, 1.5, 1.0, 0.5)
    with pytest.raises(ValueError, match="num_steps is 0, want at least 1"):
        falling_levels(2.5, 0)


def test_every_update_has_its_own_number_and_the_fake_network_comes_first():
    alternation = Alternation(5)
    numbers = []
    for step in range(10):
        numbers.append(alternation.fake_number(step))
        if alternation.trains_generator(step):
            numbers.append(alternation.generator_number(step))
    assert numbers == [0, 2, 4, 6, 8, 9, 10, 12, 14, 16, 18, 19]
    with pytest.raises(ValueError, match="fake_updates is 0, want at least 1"):
        Alternation(0)
