import math

import pytest
import torch

from maskdm_fast.diffusion import TimestepDraw, make_schedule

NAMES = ("linear", "cosine", "vp", "flow", "edm")
DRAW = {"seed": 3, "step": 8}


def normal_cdf(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_strata", [None, 128], ids=["independent", "stratified"])
def test_lognormal_levels_on_every_schedule(name, num_strata):
    schedule, num = make_schedule(name), 20_480
    t = TimestepDraw("lognormal", -0.4, 1.1, num_strata)(schedule, slots=torch.arange(num), **DRAW)
    z = (-0.5 * schedule.log_snr(t) + 0.4) / 1.1
    for quantile in (-1.5, -0.5, 0.0, 1.0):
        share = (z < quantile).double().mean().item()
        # Whole times round the level: by half a step of the schedule, at most 1 % of the images here.
        assert abs(share - normal_cdf(quantile)) < 4.5 * 0.5 * num**-0.5 + (0.01 if schedule.num_timesteps else 0)


def test_lognormal_on_a_flow_is_the_logit_normal():
    t = TimestepDraw("lognormal", 0.0, 1.0)(make_schedule("flow"), slots=torch.arange(20_000), **DRAW).double()
    assert torch.logit(t).mean().abs() < 4.5 * 20_000**-0.5
    assert (torch.logit(t).std() - 1).abs() < 4.5 * 40_000**-0.5


@pytest.mark.parametrize("kind", ["uniform", "lognormal"])
def test_strata_cover_the_levels_in_every_step(kind):
    draw, schedule = TimestepDraw(kind, num_strata=32), make_schedule("vp")
    for step in range(5):
        t = draw(schedule, seed=3, step=step, slots=torch.arange(32)).double()
        if kind == "uniform":
            u = t
        else:
            z = (-0.5 * schedule.log_snr(t) + 1.2) / 1.2
            u = torch.tensor([normal_cdf(value) for value in z.tolist()])
        # Strata begin at the offset of the step, so that each 32nd holds 0 to 2 images, and any half of all 15 to 17.
        assert torch.histc(u, 32, 0, 1).max() <= 2
        assert 15 <= (u < 0.5).sum() <= 17


def test_each_slot_sees_all_times():
    """Independent of where it stands in the batch, each image's time is uniform over the steps."""
    draw, schedule = TimestepDraw(num_strata=4), make_schedule("flow")
    t = torch.stack([draw(schedule, seed=3, step=step, slots=torch.arange(4)) for step in range(400)]).double()
    assert (t.mean(dim=0) - 0.5).abs().max() < 4.5 * (400 * 12) ** -0.5
    assert (torch.stack([torch.histc(column, 4, 0, 1) for column in t.T]) - 100).abs().max() < 4.5 * 75**0.5


@pytest.mark.parametrize("num_strata", [None, 12])
def test_micro_batches_draw_the_same(num_strata):
    draw, schedule = TimestepDraw("lognormal", num_strata=num_strata), make_schedule("edm")
    whole = draw(schedule, slots=torch.arange(12), **DRAW)
    parts = [draw(schedule, slots=torch.arange(i, i + 4), **DRAW) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(schedule, seed=3, step=torch.tensor(8), slots=torch.arange(12)), whole)


@pytest.mark.parametrize("name", NAMES)
def test_types(name):
    schedule = make_schedule(name)
    for kind in ("uniform", "lognormal"):
        t = TimestepDraw(kind)(schedule, slots=torch.arange(4), **DRAW)
        assert t.shape == (4,) and t.dtype == (torch.int64 if schedule.num_timesteps else torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "beta"}, "unknown timestep draw 'beta', want one of uniform, lognormal"),
        ({"std": 0.0}, "std of the timestep draw is 0.0, want more than 0"),
        ({"std": float("inf")}, "std of the timestep draw is inf, want more than 0, and finite"),
        ({"mean": float("nan")}, "mean of the timestep draw is nan, want a finite number"),
        ({"num_strata": 0}, "num_strata is 0"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TimestepDraw(**settings)
