import pytest
import torch

from maskdm_fast.diffusion import Denoiser, cosine_schedule, make_schedule, make_transitions, sample
from maskdm_fast.diffusion.transitions import ddim_transitions_at
from maskdm_fast.distill.progressive import (
    ProgressiveDistillation,
    check_student,
    grid_times,
    halvings,
    progressive_transitions,
)
from maskdm_fast.distill.regression import Instant, ddim_step, expand
from tests.distill.gaussians import (
    ALL,
    DRAW,
    NAMES,
    SHAPE,
    AffineStudent,
    ExactNetwork,
    draw_images,
    exact_denoiser,
    posterior_mean,
    predictions_of_students,
)

STUDENTS = [(name, prediction) for name in NAMES for prediction in predictions_of_students(name)]
SAMPLING = {"num_images": 3, **SHAPE, "seed": 0, "batch_size": 8, "as_float": True, "clip": False}


def points(schedule, num_steps):
    """``(t, m, s)`` of every step of the student, the first step last."""
    index = 2 * torch.arange(1, num_steps + 1)
    times = (grid_times(schedule, (index - back).clamp(min=1), 2 * num_steps) for back in (0, 1, 2))
    here, middle, there = (Instant.at(schedule, t) for t in times)
    return here, middle, there.cleaned(index == 2)


def ideal_student(name, num_steps, prediction, schedule):
    """The optimum of a round: at each time of the grid it says the target for the state that it sees."""
    here, middle, there = points(schedule, num_steps)
    method, teacher = ProgressiveDistillation(patch_size=2, num_steps=num_steps), exact_denoiser(name, "x0", schedule)

    def x0(tokens, t, alpha, sigma, labels, strength):
        index = (t[:, None] - here.t).abs().argmin(dim=1)
        instants = (Instant(x.t[index], x.alpha[index], x.sigma[index]) for x in (here, middle, there))
        return method.target(teacher, tokens, *instants)

    return exact_denoiser(name, prediction, schedule, x0)


@pytest.mark.parametrize("name", [*NAMES, "shifted-cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 16, 500])
def test_grids_are_nested_and_those_of_ddim(name, num_steps):
    schedule, index = make_schedule(name), torch.arange(num_steps, 0, -1)
    times = grid_times(schedule, index, num_steps)
    assert torch.equal(grid_times(schedule, 2 * index, 2 * num_steps), times)
    assert (times.diff() < 0).all() and len(times) == num_steps
    transitions = progressive_transitions(schedule, num_steps)
    if name == "edm":
        assert times[0] == 80.0 and (num_steps == 1 or times[-1] > schedule.noise_range[0])
        assert transitions == ddim_transitions_at(schedule, times.tolist())
    else:
        # float32 holds i/n to 1 part in 10^7, and the coefficients follow it.
        torch.testing.assert_close(times, torch.tensor(schedule.sampling_times(num_steps)).double(), rtol=1e-7, atol=0)
        for ours, ddim in zip(transitions, make_transitions(schedule, "ddim", num_steps), strict=True):
            assert (ours.c_x0, ours.c_xt) == pytest.approx((ddim.c_x0, ddim.c_xt), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("name", "prediction"), ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_the_target_is_the_published_one(name, prediction, num_steps):
    """One step of DDIM with it lands where two of the teacher do; and it is algorithm 2, term by term."""
    teacher = exact_denoiser(name, prediction)
    here, middle, there = points(teacher.schedule, num_steps)
    xt, labels = draw_images(num_steps).view(-1, 4, 4), torch.arange(num_steps) % 3
    method = ProgressiveDistillation(patch_size=2, num_steps=num_steps)
    target = method.target(teacher, xt, here, middle, there, labels)
    xm = ddim_step(xt, teacher(xt, here.t, labels), here, middle)
    xs = ddim_step(xm, teacher(xm, middle.t, labels), middle, there)
    torch.testing.assert_close(ddim_step(xt, target, here, there), xs, rtol=1e-9, atol=1e-9)
    ratio = there.sigma / here.sigma
    published = (xs - expand(ratio, xt) * xt) / expand(there.alpha - ratio * here.alpha, xt)
    torch.testing.assert_close(target, published, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "prediction"), STUDENTS)
def test_the_optimum_samples_in_half_the_steps(name, prediction):
    schedule = make_schedule(name)
    for num_steps in (1, 2, 5):
        student = ideal_student(name, num_steps, prediction, schedule)
        of_teacher = progressive_transitions(schedule, 2 * num_steps)
        want = sample(exact_denoiser(name, "x0", schedule), transitions=of_teacher, **SAMPLING)
        got = sample(student, transitions=progressive_transitions(schedule, num_steps), **SAMPLING)
        torch.testing.assert_close(got, want, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize(("name", "prediction"), STUDENTS)
def test_the_loss_is_zero_at_the_optimum_alone(name, prediction):
    schedule = make_schedule(name)
    method, arguments = ProgressiveDistillation(patch_size=2, num_steps=4), {"slots": torch.arange(32), **DRAW}
    images, teacher = draw_images(32), exact_denoiser(name, schedule.predictions[0], schedule)
    out = method(ideal_student(name, 4, prediction, schedule), teacher, images, **arguments)
    assert out["loss_per_image"].max() < 1e-16 and len(out["t"].unique()) == 4
    assert method(exact_denoiser(name, prediction, schedule), teacher, images, **arguments)["loss"] > 1e-5


def test_weights_are_those_of_the_error_of_x0():
    """At the teacher as its own student the error is known, so its weights can be read off."""
    teacher, slots, images = exact_denoiser("vp", "v"), torch.arange(64), draw_images(64)
    per_image = {
        weight: ProgressiveDistillation(patch_size=2, num_steps=8, weight=weight)(
            teacher, teacher, images, slots=slots, **DRAW
        )
        for weight in ("none", "truncated-snr", "snr-plus-one")
    }
    alpha, sigma = teacher.schedule.alpha_sigma(per_image["none"]["t"])
    snr, error = (alpha / sigma) ** 2, per_image["none"]["loss_per_image"]
    torch.testing.assert_close(per_image["truncated-snr"]["loss_per_image"], torch.maximum(error, snr * error))
    torch.testing.assert_close(per_image["snr-plus-one"]["loss_per_image"], error + snr * error)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_steps_are_drawn_evenly(name):
    schedule, slots = make_schedule(name), torch.arange(4000)
    method = ProgressiveDistillation(patch_size=2, num_steps=4)
    here, middle, there = method.instants(schedule, slots=slots, **DRAW)
    grid = grid_times(schedule, torch.arange(1, 9), 8)
    counts = torch.stack([(here.t == time).sum() for time in grid[1::2]])
    assert counts.sum() == 4000 and (counts - 1000).abs().max() < 4.5 * 750**0.5
    index = (here.t[:, None] == grid).long().argmax(dim=1)
    assert torch.equal(middle.t, grid[index - 1])
    clean = index == 1
    assert torch.equal(there.t[~clean], grid[index[~clean] - 2])
    assert (there.alpha[clean] == 1).all() and (there.sigma[clean] == 0).all() and (there.sigma[~clean] > 0).all()
    spread = ProgressiveDistillation(patch_size=2, num_steps=4, num_strata=8).instants(
        schedule, slots=slots[:8], **DRAW
    )
    assert all((spread[0].t == time).sum() in (1, 2, 3) for time in grid[1::2])
    assert torch.equal(method.instants(schedule, slots=slots[7:9], **DRAW)[0].t, here.t[7:9])


@pytest.mark.parametrize(("name", "prediction"), [("linear", "v"), ("flow", "flow"), ("edm", "edm")])
def test_training_reaches_two_steps_of_the_teacher(name, prediction):
    """A network that is affine at each time learns the teacher of four steps, and then samples as it does in two."""
    schedule, num_steps, num = make_schedule(name), 2, 256
    teacher = exact_denoiser(name, schedule.predictions[0], schedule)
    here, _, _ = points(schedule, num_steps)
    network = AffineStudent(schedule.time_input(here.t))
    student = Denoiser(network, schedule, prediction)
    method = ProgressiveDistillation(patch_size=2, num_steps=num_steps, weight="snr-plus-one")
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = method(student, teacher, draw_images(num), slots=torch.arange(num), **DRAW)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() < 1e-10
    want = sample(teacher, transitions=progressive_transitions(schedule, 2 * num_steps), **SAMPLING)
    got = sample(student, transitions=progressive_transitions(schedule, num_steps), **SAMPLING)
    torch.testing.assert_close(got, want, rtol=0.0, atol=2e-3)
    other = sample(teacher, transitions=progressive_transitions(schedule, num_steps), **SAMPLING)
    assert (other - want).abs().max() > 0.02


def test_rounds():
    assert halvings(8, 1) == (4, 2, 1)
    assert halvings(1000, 125) == (500, 250, 125)
    for first, last in ((8, 3), (8, 8), (4, 8), (12, 1), (8, 0)):
        with pytest.raises(ValueError, match=f"{first} steps cannot be halved down to {last}"):
            halvings(first, last)


def test_a_stage_after_a_stage():
    """The student of one round teaches the next: 4 steps of the exact teacher, then 2, then 1."""
    schedule = make_schedule("vp")
    two = ideal_student("vp", 2, "v", schedule)
    here, middle, there = points(schedule, 1)
    method = ProgressiveDistillation(patch_size=2, num_steps=1)
    one = Denoiser(
        ExactNetwork("vp", schedule, "v", lambda tokens, *_: method.target(two, tokens, here, middle, there)),
        schedule,
        "v",
    )
    teacher = Denoiser(ExactNetwork("vp", schedule, "v", posterior_mean), schedule, "v")
    want = sample(teacher, transitions=progressive_transitions(schedule, 4), **SAMPLING)
    arguments = SAMPLING | {"batch_size": 1}
    torch.testing.assert_close(
        sample(one, transitions=progressive_transitions(schedule, 1), **arguments), want, rtol=0.0, atol=2e-5
    )


def test_errors():
    schedule, images = make_schedule("vp"), draw_images(1)
    student, teacher = exact_denoiser("vp", "eps", schedule), exact_denoiser("vp", "eps", schedule)
    arguments = {"slots": torch.arange(1), **DRAW}
    with pytest.raises(ValueError, match="the student predicts eps, from which x0 cannot be read"):
        ProgressiveDistillation(patch_size=2, num_steps=1)(student, teacher, images, **arguments)
    check_student(exact_denoiser("vp", "v"))
    with pytest.raises(ValueError, match="num_steps is 0, want at least 1"):
        ProgressiveDistillation(patch_size=2, num_steps=0)
    for num_steps in (0, -1):
        with pytest.raises(ValueError, match=f"num_steps is {num_steps}, want at least 1"):
            progressive_transitions(make_schedule("vp"), num_steps)
    short = cosine_schedule(10)
    assert len(progressive_transitions(short, 10)) == 10
    with pytest.raises(ValueError, match="num_steps is 12, want 1 to 10, the time steps"):
        ProgressiveDistillation(patch_size=2, num_steps=6)(
            Denoiser(student.model, short, "v"), Denoiser(student.model, short, "eps"), images, **arguments
        )
    with pytest.raises(ValueError, match="num_strata is 0"):
        ProgressiveDistillation(patch_size=2, num_steps=1, num_strata=0).instants(schedule, **arguments)
