import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from maskdm_fast.diffusion import (
    cosine_schedule,
    ddim_transitions_at,
    linear_schedule,
    make_schedule,
    make_transitions,
)
from maskdm_fast.diffusion.schedule import SCHEDULES
from maskdm_fast.diffusion.transitions import ddim_transitions, ddpm_transitions

# Those whose least noise is next to none, and whose greatest leaves next to nothing of the image.
WHOLE = [name for name in SCHEDULES if name != "scaled-linear"]
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("sampler", ORDERS)
def test_order_of_convergence(gaussian, name, sampler):
    """With twice the steps, the error to the exact ODE falls by 2 or 4."""
    schedule, steps = make_schedule(name, 128), (40, 80, 160, 320)
    errors = []
    for num_steps in steps:
        transitions = make_transitions(schedule, sampler, num_steps)
        slope, shift, _ = gaussian.chain(schedule, transitions)
        # First-order samplers end nearer to the clean image the more steps they make. The others always end at the
        # least noise of the schedule, and what the last step from there neglects is not what this test measures.
        end = 0 if ORDERS[sampler] == 1 and schedule.num_timesteps is None else transitions[-1].t
        want_slope, want_shift = gaussian.exact(schedule, transitions[0].t, max(end, 1e-9))
        errors.append(max((slope - want_slope).abs().max(), (shift - want_shift).abs().max()).item())
    # By least squares on the logarithms.
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors))
    order = -((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert order.item() == pytest.approx(ORDERS[sampler], abs=0.15), errors


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("sampler", ORDERS)
def test_the_limit_is_the_law_of_the_data(gaussian, name, sampler):
    schedule = make_schedule(name, 128)
    slope, shift, _ = gaussian.chain(schedule, make_transitions(schedule, sampler, 500))
    # What the start misses of the mean, alpha m, shrinks on the way; the last step forgets less than 0.4 % of the STD.
    assert (slope / gaussian.std - 1).abs().max() < (0.025 if ORDERS[sampler] == 1 else 0.004)
    assert (shift - gaussian.mean).abs().max() < 0.01


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_chains_converge_to_the_law_of_the_data(gaussian, name, eta):
    schedule, errors = make_schedule(name, 128), []
    for num_steps in (100, 1000):
        slope, shift, var = gaussian.chain(schedule, ddim_transitions(schedule, num_steps, eta))
        errors.append(((slope**2 + var).sqrt() / gaussian.std - 1).abs().max())
        assert (shift - gaussian.mean).abs().max() < 0.01
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50, 999, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_transitions_keep_the_marginals(name, num_steps, eta):
    """If x_t is N(alpha_t x0, sigma_t^2), then x_s is N(alpha_s x0, sigma_s^2): it defines them, for any step width."""
    schedule = make_schedule(name, 128)
    transitions = ddim_transitions(schedule, num_steps, eta)
    assert len(transitions) == num_steps and [step.t for step in transitions] == schedule.sampling_times(num_steps)
    times = torch.tensor([step.t for step in transitions], dtype=torch.float64)
    scales = [*zip(*(scale.tolist() for scale in schedule.alpha_sigma(times)), strict=True), (1.0, 0.0)]
    for step, (alpha, sigma), (next_alpha, next_sigma) in zip(transitions, scales[:-1], scales[1:], strict=True):
        assert step.c_x0 + step.c_xt * alpha == pytest.approx(next_alpha, rel=1e-12)
        assert step.c_xt**2 * sigma**2 + step.std**2 == pytest.approx(next_sigma**2, rel=1e-9, abs=1e-15)
        # The paper's form of the noise, and no noise for eta = 0.
        rest = max(0.0, 1 - (alpha * next_sigma / (next_alpha * sigma)) ** 2)
        assert step.std == pytest.approx(eta * next_sigma * math.sqrt(rest), rel=1e-6)
    assert (transitions[-1].c_x0, transitions[-1].c_xt, transitions[-1].std) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 17])
def test_a_known_image_is_reached(name, sampler, num_steps):
    """If the denoiser knows x0, xt = alpha x0 + sigma z stays so at every step, and the last one ends at x0."""
    schedule, x0, z = make_schedule(name, 128), 0.7, -1.3
    transitions = make_transitions(schedule, sampler, num_steps)
    assert len(transitions) == (2 * num_steps - 1 if sampler == "heun" else num_steps)
    times = torch.tensor([step.t for step in transitions], dtype=torch.float64)
    assert all(t > s or (sampler == "heun" and t == s) for t, s in itertools.pairwise(times.tolist()))
    scales = zip(*(scale.tolist() for scale in schedule.alpha_sigma(times)), strict=True)
    x = None
    for step, (alpha, sigma) in zip(transitions, scales, strict=True):
        want = alpha * x0 + sigma * z
        assert x is None or x == pytest.approx(want, rel=1e-9)
        x = (step.c_x0 + step.c_last) * x0 + step.c_xt * want
    assert x == pytest.approx(x0, rel=1e-12)


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


def test_heun_is_the_algorithm_of_the_paper():
    """On the EDM schedule, in the variables of the paper, with a denoiser that is not linear."""
    schedule = make_schedule("edm", 128)
    places = torch.linspace(0, 1, 6, dtype=torch.float64)
    sigmas = [*((80 ** (1 / 7) + places * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist(), 0.0]

    def denoise(x, sigma):
        return math.tanh(x / (1 + sigma))

    x = want = 55.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        d = (want - denoise(want, sigma)) / sigma
        euler = want + (sigma_next - sigma) * d
        if sigma_next:
            d = (d + (euler - denoise(euler, sigma_next)) / sigma_next) / 2
            euler = want + (sigma_next - sigma) * d
        want = euler
    transitions = make_transitions(schedule, "heun", 6)
    state, last = x / math.hypot(80, 0.5), 0.0
    for step in transitions:
        x0 = denoise(state * math.hypot(step.t, 0.5), step.t)
        state, last = step.c_x0 * x0 + step.c_xt * state + step.c_last * last, x0
    assert state == pytest.approx(want, rel=1e-9)


def test_euler_is_ddim_on_a_flow_and_follows_its_velocity():
    schedule = make_schedule("flow", 128)
    transitions = make_transitions(schedule, "euler", 4)
    x, x0 = 0.3, -0.9
    for step, ddim in zip(transitions, ddim_transitions(schedule, 4, 0.0), strict=True):
        assert step.t == pytest.approx(ddim.t, rel=1e-12)
        stepped = step.c_x0 * x0 + step.c_xt * x
        assert stepped == pytest.approx(x - 0.25 * (x - x0) / step.t, rel=1e-9)  # v = eps - x0 = (x - x0) / t
        x = stepped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddim", 0), "num_steps is 0, want 1 to 1000"),
        (("ddim", 1001), "num_steps is 1001, want 1 to 1000"),
        (("heun", 0), "num_steps is 0, want at least 1"),
        (("dpmpp_2m", -1), "num_steps is -1, want at least 1"),
        (("euler", 0), "num_steps is 0, want at least 1"),
        (("ddim", 5, 1.5), "eta is 1.5, want 0"),
        (("ddim", 5, -0.5), "eta is -0.5"),
        (("plms", 5), "unknown sampler 'plms', want one of ddim, ddpm, euler, heun, dpmpp_2m"),
        (("ddpm", 5, 1.0), "sampler 'ddpm' has none; leave it None or choose 'ddim'"),
        (("heun", 5, 0.0), "sampler 'heun' has none"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_transitions(cosine_schedule(), *arguments)


def test_the_table_of_the_docs_is_the_computed_one(gaussian):
    text = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    evaluations = [int(cell) for cell in re.search(r"^\| evaluations \|(.*)\|$", text, re.MULTILINE)[1].split("|")]
    rows = re.findall(r"^\| `(\w+)`, `(\w+)` \|(.* %) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for name, sampler, cells in rows:
        want = []
        for number in evaluations:
            transitions = make_transitions(
                make_schedule(name), sampler, (number + 1) // 2 if sampler == "heun" else number
            )
            slope, _, _ = gaussian.chain(make_schedule(name), transitions)
            want.append(f"{100 * (slope / gaussian.std - 1).abs().max():.2f} %")
        assert [cell.strip() for cell in cells.split("|")] == want, (name, sampler)


def test_a_schedule_of_one_time_takes_steps_in_place():
    """dpmpp_2m divided by their width."""
    schedule = cosine_schedule(1)
    for sampler in ("euler", "heun", "dpmpp_2m"):
        *before, last = make_transitions(schedule, sampler, 3)
        assert all((step.t, step.c_x0 + step.c_last, step.c_xt) == (0.0, 0.0, 1.0) for step in before)
        assert (last.c_x0, last.c_xt) == (1.0, 0.0)


def test_ddim_at_times_of_ones_own():
    schedule = make_schedule("vp")
    first, last = ddim_transitions_at(schedule, [0.8, 0.3])
    (alpha, alpha_s), (sigma, sigma_s) = (x.tolist() for x in schedule.alpha_sigma(torch.tensor([0.8, 0.3]).double()))
    assert first.c_xt == pytest.approx(sigma_s / sigma) and first.std == 0.0
    assert first.c_x0 == pytest.approx(alpha_s - alpha * sigma_s / sigma)
    assert (last.t, last.c_x0, last.c_xt) == (0.3, 1.0, 0.0)
    assert ddim_transitions_at(schedule, schedule.sampling_times(7), 0.5) == ddim_transitions(schedule, 7, 0.5)
