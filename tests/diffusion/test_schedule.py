import itertools
import math

import pytest
import torch

from maskdm_fast.diffusion import (
    DiscreteSchedule,
    VPSchedule,
    cosine_schedule,
    linear_schedule,
    make_schedule,
    scaled_linear_schedule,
    shifted_cosine_schedule,
)

NAMES = ("linear", "scaled-linear", "cosine", "shifted-cosine", "vp", "flow", "edm")
LEAST = {"vp": 1e-4, "flow": 1e-4, "edm": 1e-3}
GREATEST = {"vp": 1.0, "flow": 0.999, "edm": 100.0}


def times_of(name, num=301):
    return torch.linspace(LEAST.get(name, 0.0), GREATEST.get(name, 999.0), num, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "anchors"),
    [
        ("linear", {0: (0.9999, 1e-12), 499: (0.0786, 5e-5), 999: (4.04e-5, 5e-8)}),
        ("scaled-linear", {0: (0.99915, 1e-12), 499: (0.2777, 5e-5), 999: (4.66e-3, 5e-6)}),
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


def test_shifted_cosine_moves_the_log_snr():
    torch.testing.assert_close(shifted_cosine_schedule(64).alpha_bar, cosine_schedule().alpha_bar)
    moved = shifted_cosine_schedule(256).log_snr(torch.arange(1000)) - cosine_schedule().log_snr(torch.arange(1000))
    torch.testing.assert_close(moved, torch.full_like(moved, -2 * math.log(4)), rtol=1e-6, atol=1e-6)


def test_discrete_times_between_whole_ones_are_interpolated():
    schedule = cosine_schedule(50)
    whole = torch.arange(50)
    for values, table in zip(schedule.alpha_sigma(whole.double()), schedule.alpha_sigma(whole), strict=True):
        assert values.dtype == torch.float64
        torch.testing.assert_close(values.float(), table, rtol=1e-7, atol=0.0)
    here = schedule.log_snr(torch.tensor([10.0, 10.25, 11.0], dtype=torch.float64))
    torch.testing.assert_close(here[1], 0.75 * here[0] + 0.25 * here[2])


def test_times_that_are_none():
    """-1 was T - 1, and a time before the first was extrapolated where one after the last was not."""
    schedule = cosine_schedule(50)
    for beyond, end in ((-50.0, 0), (-0.5, 0), (49.5, 49), (2000.0, 49)):
        for values, table in zip(
            schedule.alpha_sigma(torch.tensor([beyond])), schedule.alpha_sigma(torch.tensor([end])), strict=True
        ):
            torch.testing.assert_close(values, table)
    for beyond in (-1, 50):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            schedule.alpha_sigma(torch.tensor([0, beyond]))
    assert schedule.alpha_sigma(torch.tensor(7))[0].shape == ()


def test_scaled_linear_counts_from_one():
    schedule, t = scaled_linear_schedule(), torch.tensor([0, 999])
    assert schedule.time_input(t).tolist() == [1, 1000]
    beta = 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    steps = beta.sqrt().diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_monotone_and_come_in_the_dtype_of_the_times(name):
    schedule, t = make_schedule(name, 128), times_of(name)
    alpha, sigma = schedule.alpha_sigma(t)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all() and (schedule.log_snr(t).diff() < 0).all()
    for exact, rounded in zip((alpha, sigma), schedule.alpha_sigma(t.float()), strict=True):
        assert exact.dtype == torch.float64 and rounded.dtype == torch.float32
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_continuous_scales_are_their_formulas(name):
    t = times_of(name)
    alpha, sigma = make_schedule(name).alpha_sigma(t)
    want = {
        "vp": lambda: torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t),
        "flow": lambda: 1 - t,
        "edm": lambda: 1 / (t**2 + 0.25).sqrt(),
    }[name]()
    torch.testing.assert_close(alpha, want)
    torch.testing.assert_close(
        sigma, {"vp": lambda: (1 - want**2).sqrt(), "flow": lambda: t, "edm": lambda: t * want}[name]()
    )


@pytest.mark.parametrize("name", NAMES)
def test_time_of_a_noise_level_is_the_inverse(name):
    schedule, t = make_schedule(name, 128), times_of(name)
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-7, atol=1e-7)
    nearest = schedule.nearest_timesteps(schedule.log_snr(t))
    assert nearest.dtype == (torch.int64 if schedule.num_timesteps else torch.float32)
    beyond = schedule.t_of_log_snr(torch.tensor([60.0, -60.0]))
    if name != "edm":  # whose noise has no end
        assert 0 <= beyond[0] < 1e-6 and beyond[1] == pytest.approx(
            schedule.num_timesteps - 1 if schedule.num_timesteps else 1
        )
    # Where alpha is 0 in float32 its logarithm says so.
    last = schedule.t_of_log_snr(torch.tensor(-math.inf))
    assert last == (math.inf if name == "edm" else schedule.num_timesteps - 1 if schedule.num_timesteps else 1)
    assert cosine_schedule(1).t_of_log_snr(torch.tensor([3.0])).item() == 0


def test_known_times_of_noise_levels():
    """The times at which other schedules are as noisy as sigma = 2.5 and 24.4 of EDM."""
    for name, level, time, tolerance in [
        ("linear", 2.5, 440, 1),
        ("linear", 24.4, 794, 1),
        ("cosine", 2.5, 755, 1),
        ("flow", 2.5, 0.714, 1e-3),
        ("flow", 24.4, 0.961, 1e-3),
        ("edm", 2.5, 2.5, 1e-9),
    ]:
        log_snr = torch.tensor(-2 * math.log(level), dtype=torch.float64)
        assert make_schedule(name).t_of_log_snr(log_snr).item() == pytest.approx(time, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_uniform_draws_become_times_in_order(name):
    schedule = make_schedule(name)
    u = torch.tensor([2.0**-32, 0.25, 0.5, 0.75, 1 - 2.0**-32], dtype=torch.float64)
    t = schedule.timesteps(u)
    assert (t.diff() > 0).all()
    want = {"vp": (0, 0.5, 1), "flow": (0, 0.5, 1), "edm": (0.002, 2.515, 80)}.get(name, (0, 500, 999))
    assert [t[0].item(), t[2].item(), t[-1].item()] == pytest.approx(want, rel=1e-3, abs=1e-8)
    assert t.dtype == (torch.int64 if schedule.num_timesteps else torch.float32)
    inputs = schedule.time_input(t).double()
    assert (inputs.diff() > 0).all() and inputs.abs().max() <= 1000
    assert inputs[-1] - inputs[0] == pytest.approx({"edm": 1060, "flow": 1000}.get(name, 999), abs=1)


def test_sampling_times():
    schedule = linear_schedule()
    assert schedule.sampling_times(1) == [999]
    assert schedule.sampling_times(2) == [999, 499]
    assert schedule.sampling_times(1000) == list(range(999, -1, -1))
    for num_steps in (3, 7, 250, 999):
        times = schedule.sampling_times(num_steps)
        reference = torch.linspace(-1, 999, num_steps + 1, dtype=torch.float64).flip(0)[:-1]
        assert len(times) == num_steps and times[0] == 999 and times[-1] >= 0
        assert all(t > s for t, s in itertools.pairwise(times))
        # Floating point may fall to either side of an integer; the integers here do not.
        assert all(math.floor(r - 1e-9) <= t <= r + 1e-9 for t, r in zip(times, reference.tolist(), strict=True))
    assert make_schedule("flow").sampling_times(4) == make_schedule("vp").sampling_times(4) == [1.0, 0.75, 0.5, 0.25]
    levels = make_schedule("edm").sampling_times(18)
    assert levels[0] == pytest.approx(80) and levels[1] == pytest.approx(57.586, abs=1e-3)
    assert levels[-1] == pytest.approx(0.002)
    for name in ("vp", "flow", "edm"):
        with pytest.raises(ValueError, match="num_steps is 0, want at least 1"):
            make_schedule(name).sampling_times(0)


def test_errors():
    with pytest.raises(
        ValueError, match="unknown noise schedule 'sigmoid', want one of linear, scaled-linear, cosine, "
    ):
        make_schedule("sigmoid")
    with pytest.raises(ValueError, match="num_timesteps is 20, want more than 20"):
        linear_schedule(20)
    with pytest.raises(ValueError, match="image_size is 0"):
        shifted_cosine_schedule(0)
    for beta in ((1.0, 0.5), (0.1, math.inf)):
        with pytest.raises(ValueError, match="want 0 < beta_min < beta_max < infinity"):
            VPSchedule(*beta)
    with pytest.raises(ValueError, match="num_timesteps is 0"):
        cosine_schedule(0)
    with pytest.raises(TypeError, match=r"alpha_bar is torch\.float32, want torch\.float64"):
        DiscreteSchedule(torch.tensor([0.5]))
    for values in ([0.5, 0.6], [1.0, 0.5], [0.5, 0.0], [0.5, 0.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="strictly decrease"):
            DiscreteSchedule(torch.tensor(values, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"alpha_bar has shape \[0\]"):
        DiscreteSchedule(torch.zeros(0, dtype=torch.float64))
