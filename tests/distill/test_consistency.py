import dataclasses
import itertools

import pytest
import torch

from maskdm_fast.diffusion import Denoiser, Guidance, TimestepDraw, make_schedule, sample, to_x0
from maskdm_fast.distill.consistency import ConsistencyDistillation, StepMapping, consistency_transitions
from maskdm_fast.distill.regression import Instant
from tests.distill.gaussians import (
    ALL,
    DRAW,
    MEAN,
    NAMES,
    SHAPE,
    SHIFT,
    STD,
    AffineStudent,
    ExactNetwork,
    draw_images,
    exact_denoiser,
)

VAR = STD**2
MAPPING = StepMapping(steps_per_stage=10)
METHOD = ConsistencyDistillation(patch_size=2, mapping=MAPPING)


def levels(schedule, *values):
    t = schedule.t_of_log_snr(-2.0 * torch.tensor(values, dtype=torch.float64).log())
    return Instant.at(schedule, t)


def chain(schedule, level, mapping, step):
    """Slope of y = xt/alpha in the optimum, x0 - m = slope (y - m), for levels ``[B, 1, 1]``.

    From level n to r a step of Euler under the exact denoiser multiplies y - m by ``(v + r n) / (v + n^2)``, and so
    does the mean of y_r given y_n where both have the same noise: distillation and training have one optimum.
    """
    least = schedule.noise_range[0]
    slope, active = torch.ones(level.shape[0], 4, 4).double(), torch.ones_like(level, dtype=torch.bool)
    while active.any():
        lower = mapping(level, step)
        lower = torch.where(lower < least, 0.0, lower)
        slope = torch.where(active, slope * (VAR + lower * level) / (VAR + level**2), slope)
        active, level = active & (lower > 0), torch.where(lower > 0, lower, level)
    return slope


def optimum(name, prediction, schedule, mapping, step):
    def x0(tokens, t, alpha, sigma, labels, strength):
        return MEAN + chain(schedule, sigma / alpha, mapping, step) * (tokens / alpha - MEAN)

    return exact_denoiser(name, prediction, schedule, x0)


def end_of_path(tokens, t, alpha, sigma, labels, strength):
    """The ODE of the exact denoiser keeps ``(y - m) / sqrt(v + n^2)``, y = xt / alpha."""
    mean = MEAN if labels is None else MEAN + SHIFT * labels[:, None, None]
    return mean + STD / (VAR + (sigma / alpha) ** 2).sqrt() * (tokens / alpha - mean)


def test_the_mapping():
    mapping = StepMapping(steps_per_stage=100, num_stages=3)
    t = torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64)
    for step, decay in ((0, 0.5), (99, 0.5), (100, 0.25), (299, 0.125), (10**6, 0.125)):
        want = (t * (1 - decay * (1 + 8 / (1 + t.exp())))).clamp(min=0)
        torch.testing.assert_close(mapping(t, step), want)
        assert torch.equal(mapping(t, torch.tensor(step)), mapping(t, step))
        assert (mapping(t, step) < t).all()
    assert mapping(t, 0).tolist()[:2] == [0.0, 0.0]  # the first stage denoises at low levels
    assert mapping(t, 0)[3].item() == pytest.approx(40.0)
    assert (StepMapping(100, k=0.0)(t, 0) == 0.5 * t).all()
    assert (StepMapping(100, q=4.0, k=0.0)(t, 0) == 0.75 * t).all()


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "edm"])
def test_the_form_of_the_prediction_is_the_identity_at_the_clean_end(prediction):
    xt, said = draw_images(2).view(2, 4, 4), draw_images(2, seed=9).view(2, 4, 4)
    alpha = torch.tensor([2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(to_x0(said, xt, alpha, torch.zeros_like(alpha), prediction), xt / alpha[:, None, None])


@pytest.mark.parametrize(("name", "prediction"), ALL)
@pytest.mark.parametrize("step", [0, 25])
def test_distillation_has_no_loss_at_its_optimum(name, prediction, step):
    schedule, num = make_schedule(name), 24
    arguments = {"slots": torch.arange(num), "seed": 3, "step": step}
    teacher = exact_denoiser(name, schedule.predictions[0], schedule)
    method = dataclasses.replace(METHOD, weight="none")
    student = optimum(name, prediction, schedule, MAPPING, step)
    out = method(student, teacher, draw_images(num), **arguments)
    # At level 80 eps leaves x0 with an error of 80 roundings of float64.
    assert out["loss_per_image"].max() < 1e-9
    denoiser = exact_denoiser(name, prediction, schedule)
    assert method(denoiser, teacher, draw_images(num), **arguments)["loss"] > 1e-4


@pytest.mark.parametrize(("name", "prediction"), [("linear", "v"), ("flow", "flow"), ("edm", "edm"), ("vp", "x0")])
@pytest.mark.parametrize("step", [0, 25])
def test_training_without_a_teacher_has_the_same_optimum(name, prediction, step):
    """Neither slope nor shift of the student would lessen the mean squared error to its targets."""
    schedule, num = make_schedule(name), 20_000
    student = optimum(name, prediction, schedule, MAPPING, step)
    targets = []

    class Recording(ConsistencyDistillation):
        def distance(self, x0, target):
            targets.append((x0, target))
            return super().distance(x0, target)

    method = Recording(patch_size=2, mapping=MAPPING, timesteps=TimestepDraw("lognormal", 0.0, 1e-6))
    out = method(student, None, draw_images(num), slots=torch.arange(num), seed=3, step=step)
    (x0, target), = targets  # fmt: skip
    error = x0 - target
    assert error.square().mean() > 1e-4 and out["loss"] > 0
    for test in (torch.ones_like(x0), (x0 - MEAN) / x0.std(dim=0)):
        mean, std = (error * test).mean(dim=0), (error * test).std(dim=0)
        assert (mean.abs() < 4.5 * std * num**-0.5 + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_end_of_the_path_is_left_by_the_error_of_the_solver_alone(name, solver, order):
    """With half the gap, what the student at its ideal misses its target by falls by 4 or 8."""
    schedule = make_schedule(name)
    teacher, student = (exact_denoiser(name, "x0", schedule, *f) for f in ((), (end_of_path,)))
    method = dataclasses.replace(METHOD, solver=solver)
    xt, errors = draw_images(3).view(3, 4, 4), []
    at = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    here = levels(schedule, *at.tolist())
    for gap in (2**-5, 2**-6, 2**-7):
        there = levels(schedule, *(at * (1 - gap)).tolist())
        xr = method.teacher_step(teacher, xt, here, there)
        errors.append((student(xr, there.t) - student(xt, here.t)).square().mean().sqrt())
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(2**order, rel=0.08)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_heun_is_the_published_one(name):
    """In ``y = xt / alpha`` and the levels n: ``y + (r - n) (d + d') / 2`` with slopes ``d = (y - x0) / n``."""
    schedule = make_schedule(name)
    teacher = exact_denoiser(name, "x0", schedule)
    here, there = (levels(schedule, *values) for values in ((0.3, 1.0, 4.0), (0.1, 0.7, 1.0)))
    xt = draw_images(3).view(3, 4, 4)
    alpha, n, alpha_r, r = (scale[:, None, None] for scale in (here.alpha, here.noise, there.alpha, there.noise))
    y = xt / alpha
    slope = (y - teacher(xt, here.t)) / n
    first = y + (r - n) * slope
    second = (first - teacher(alpha_r * first, there.t)) / r
    want = alpha_r * (y + (r - n) * 0.5 * (slope + second))
    found = dataclasses.replace(METHOD, solver="heun").teacher_step(teacher, xt, here, there)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(METHOD.teacher_step(teacher, xt, here, there), alpha_r * first, rtol=1e-6, atol=1e-6)


def test_the_optimum_comes_near_to_the_end_of_the_path():
    schedule = make_schedule("edm")
    level = torch.tensor([0.1, 0.5, 2.0, 20.0], dtype=torch.float64)[:, None, None]
    want = STD / (VAR + level**2).sqrt()
    errors = [(chain(schedule, level, StepMapping(1), stage) / want - 1).abs().max() for stage in (3, 5, 7)]
    assert errors[2] < 0.03 and errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_clean_target_is_the_image_or_the_teachers(solver):
    schedule = make_schedule("edm")
    method = dataclasses.replace(
        METHOD, solver=solver, weight="none", timesteps=TimestepDraw("lognormal", -2.0, 0.3), huber=1e-9
    )
    teacher, arguments = exact_denoiser("edm", "edm", schedule), {"slots": torch.arange(8), "seed": 3, "step": 0}
    assert method(teacher, teacher, draw_images(8), **arguments)["loss"] < 1e-12
    here, there = method.instants(schedule, **arguments)
    assert (there.sigma == 0).all() and (there.alpha == 1).all()
    xt, x0 = method.noisy(draw_images(8), here, **arguments)
    out = method(teacher, None, draw_images(8), **arguments)
    want = (teacher(xt, here.t) - x0).square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(out["loss_per_image"], want)


def test_distance_and_weights():
    x0, target = draw_images(3).view(3, 4, 4), draw_images(3, seed=9).view(3, 4, 4)
    d = dataclasses.replace(METHOD, huber=0.3).distance(x0, target)
    squares = (x0 - target).square().sum(dim=(1, 2))
    # The published distance has c = 0.3 sqrt(16) and the sum over values.
    torch.testing.assert_close(d, ((squares + 16 * 0.3**2).sqrt() - 4 * 0.3) / 4)
    same = x0.clone().requires_grad_()
    METHOD.distance(same, x0).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(x0))

    schedule, slots, student = make_schedule("vp"), torch.arange(6), exact_denoiser("vp", "v")
    losses = {
        weight: dataclasses.replace(METHOD, weight=weight)(student, None, draw_images(6), slots=slots, **DRAW)
        for weight in ("none", "gap", "edm")
    }
    here, there = METHOD.instants(schedule, slots=slots, **DRAW)
    base = losses["none"]["loss_per_image"]
    torch.testing.assert_close(losses["gap"]["loss_per_image"], base / (here.noise - there.noise))
    torch.testing.assert_close(losses["edm"]["loss_per_image"], base * (here.noise**-2 + 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["lognormal", "uniform"])
def test_levels_stay_within_the_schedule(name, kind):
    schedule, slots = make_schedule(name), torch.arange(2000)
    method = dataclasses.replace(METHOD, timesteps=TimestepDraw(kind, 0.0, 6.0))
    here, there = method.instants(schedule, slots=slots, seed=3, step=30)
    least, greatest = schedule.noise_range
    assert here.noise.min() >= least * (1 - 1e-9) and here.noise.max() <= greatest * (1 + 1e-9)
    clean = there.sigma == 0
    assert clean.sum() < 2000
    if kind == "lognormal":
        assert (here.noise == here.noise.min()).sum() > 100 and clean.sum() > 100
    torch.testing.assert_close(there.noise[~clean], MAPPING(here.noise, 30)[~clean])
    assert (MAPPING(here.noise, 30)[clean] < least).all() and (there.noise[~clean] < here.noise[~clean]).all()
    part = method.instants(schedule, slots=slots[7:9], seed=3, step=30)
    assert torch.equal(part[0].t, here.t[7:9]) and torch.equal(part[1].sigma, there.sigma[7:9])


def test_an_average_makes_the_targets_and_gets_no_gradient():
    schedule = make_schedule("vp")
    scale, other = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.2))
    student, average = (
        Denoiser(lambda tokens, t, ids_keep, labels, s=s: s * tokens, schedule, "x0") for s in (scale, other)
    )
    method = dataclasses.replace(METHOD, timesteps=TimestepDraw("lognormal", 1.0, 0.5))
    arguments = {"slots": torch.arange(8), "seed": 3, "step": 40}
    alone = method(student, None, draw_images(8), **arguments)["loss"]
    with_average = method(student, None, draw_images(8), average=average, **arguments)["loss"]
    assert with_average > 1.5 * alone
    (with_average + alone).backward()
    assert other.grad is None and scale.grad.abs() > 0


def test_a_guided_teacher():
    """Its steps are those of the guided denoiser."""
    schedule = make_schedule("vp")
    method, labels = dataclasses.replace(METHOD, guidance=Guidance(2.5)), torch.tensor([0, 1, 2])
    teacher = exact_denoiser("vp", "v", schedule)
    xt, here, there = draw_images(3).view(3, 4, 4), levels(schedule, 1.0, 2.0, 3.0), levels(schedule, 0.9, 1.8, 2.5)
    step = method.teacher_step(teacher, xt, here, there, labels)
    x0 = teacher(xt, here.t, labels, Guidance(2.5))
    alpha, sigma, alpha_r, sigma_r = (
        s[:, None, None] for s in (here.alpha, here.sigma, there.alpha, there.sigma)
    )  # fmt: skip
    torch.testing.assert_close(step, alpha_r * x0 + sigma_r * (xt - alpha * x0) / sigma)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_law_of_the_data(name):
    """Of a student that knows the ends of all paths, in one step and in three; and no batch size changes them."""
    schedule, num = make_schedule(name), 4000
    student = exact_denoiser(name, schedule.predictions[-1], schedule, end_of_path)
    arguments = {**SHAPE, "seed": 1, "as_float": True, "clip": False}
    for visited in ((), (2.0, 0.4)):
        transitions = consistency_transitions(schedule, visited)
        assert len(transitions) == 1 + len(visited)
        images = sample(student, num_images=num, batch_size=num, transitions=transitions, **arguments)
        tokens = images.view(num, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(num, 4, 4).double()
        z = (tokens - MEAN) / STD
        # Noise begins without the mean of the images, which is STD / 80 of them at most here.
        assert z.mean(dim=0).abs().max() < 4.5 * num**-0.5 + 0.06
        assert (z.std(dim=0) - 1).abs().max() < 4.5 * (2 * num) ** -0.5 + 0.01
        few = sample(student, num_images=5, batch_size=2, transitions=transitions, **arguments)
        torch.testing.assert_close(few, images[:5])


def test_steps_of_the_sampler():
    schedule = make_schedule("vp")
    first, second = consistency_transitions(schedule, (0.821,))
    here = levels(schedule, 80.0, 0.821)
    assert (first.t, second.t) == pytest.approx(tuple(here.t.tolist()))
    assert (first.c_x0, first.std) == pytest.approx((here.alpha[1].item(), here.sigma[1].item()))
    assert (second.c_x0, second.std, first.c_xt, second.c_xt) == (1.0, 0.0, 0.0, 0.0)
    for wrong in ((90.0,), (1.0, 1.0), (0.5, 0.8), (0.001,)):
        with pytest.raises(ValueError, match=r"want falling ones between 80 and 0\.002"):
            consistency_transitions(schedule, wrong)


@pytest.mark.parametrize("with_teacher", [True, False], ids=["distillation", "training"])
def test_tuning_reaches_the_optimum(with_teacher):
    """From the denoiser on: an affine student on a ladder of levels, each half the one above."""
    schedule, num = make_schedule("edm"), 2048
    mapping = StepMapping(1, num_stages=1, k=0.0)
    ladder = 2.0 ** torch.arange(-5, 2, dtype=torch.float64)
    network = AffineStudent(schedule.time_input(ladder))
    student = Denoiser(network, schedule, "edm")

    class OnLadder(ConsistencyDistillation):
        """Draws its levels from the ladder; the lowest is compared with the clean image."""

        def instants(self, schedule, **draw):
            u = self.timesteps.uniform(**draw)
            index = (u * len(ladder)).long()
            there = Instant.at(schedule, ladder[(index - 1).clamp(min=0)]).cleaned(index == 0)
            return Instant.at(schedule, ladder[index]), there

    method = OnLadder(patch_size=2, mapping=mapping, timesteps=TimestepDraw(num_strata=num), huber=10.0, weight="edm")
    teacher = exact_denoiser("edm", "edm", schedule) if with_teacher else None
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400) ** 2
        out = method(student, teacher, draw_images(num, seed=step), slots=torch.arange(num), seed=1, step=step)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    slope = torch.ones(4, 4).double()
    xt = draw_images(1).view(1, 4, 4)
    for lower, level in zip([0.0, *ladder.tolist()], ladder.tolist(), strict=False):
        slope = slope * (VAR + lower * level) / (VAR + level**2)
        here = Instant.at(schedule, torch.tensor([level]))
        want = MEAN + slope * (xt / here.alpha - MEAN)
        got = student(xt, here.t)
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.02 if with_teacher else 0.06)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepMapping(0), "steps_per_stage is 0, want at least 1"),
        (lambda: StepMapping(1, num_stages=0), "num_stages is 0"),
        (lambda: StepMapping(1, k=-1.0), "k is -1.0, want at least 0"),
        (lambda: StepMapping(1, q=1.0), "q is 1.0, want more than 1"),
        (lambda: dataclasses.replace(METHOD, solver="rk4"), "unknown solver 'rk4', want euler or heun"),
        (lambda: dataclasses.replace(METHOD, huber=0.0), "huber is 0.0, want more than 0"),
        (lambda: dataclasses.replace(METHOD, weight="snr"), "unknown weight 'snr', want one of gap, none"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("changes", [{"guidance": Guidance(2.0)}, {"strengths": (0.0, 4.0)}])
def test_nobody_to_guide(changes):
    student = Denoiser(ExactNetwork("vp", make_schedule("vp"), "v"), make_schedule("vp"), "v")
    with pytest.raises(ValueError, match="there is no teacher to guide"):
        dataclasses.replace(METHOD, **changes)(student, None, draw_images(1), slots=torch.arange(1), **DRAW)
