import contextlib
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskdm_fast import ops, testing
from maskdm_fast.diffusion import Denoiser, Guidance, make_schedule
from maskdm_fast.distill.consistency import ConsistencyDistillation, StepMapping
from maskdm_fast.distill.guided import GuidedDistillation, GuidedNetwork
from maskdm_fast.distill.progressive import ProgressiveDistillation
from maskdm_fast.distill.regression import X0_WEIGHTS, Instant, Regression, ddim_step, guided_x0, tell
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.ops import backend
from tests.distill.gaussians import ALL, DRAW, NAMES, SHAPE, draw_images, exact_denoiser
from tests.train.test_waits import NoWait, to_fake_cuda

METHODS = {
    "guided": GuidedDistillation(patch_size=2, strengths=None),
    "progressive": ProgressiveDistillation(patch_size=2, num_steps=4),
    "consistency": ConsistencyDistillation(patch_size=2, mapping=StepMapping(10), solver="heun"),
    "consistency-training": ConsistencyDistillation(patch_size=2, mapping=StepMapping(10)),
}


def tiny(seed, num_classes=3):
    return UViT(UViTConfig(**SHAPE, dim=16, depth=3, num_heads=2, num_classes=num_classes), seed=seed)


def at(schedule, *times):
    return Instant.at(schedule, torch.tensor(times))


def test_weights():
    alpha, sigma = torch.tensor([0.8, 0.1]).double(), torch.tensor([0.6, 2.0]).double()
    snr = Instant(alpha, alpha, sigma).snr
    x0_error, eps_error = torch.ones(2).double(), snr
    weights = {name: weight(snr) for name, weight in X0_WEIGHTS.items()}
    assert torch.equal(weights["none"], x0_error)
    assert torch.equal(weights["truncated-snr"], torch.maximum(x0_error, eps_error))
    assert torch.equal(weights["snr-plus-one"], x0_error + eps_error)
    torch.testing.assert_close(weights["edm"], (sigma**2 / alpha**2 + 0.25) / (sigma / alpha * 0.5) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_the_true_image_keeps_the_noise(name):
    schedule, method = make_schedule(name), Regression(patch_size=2)
    times = {"linear": (999, 300), "cosine": (990, 1), "vp": (1.0, 0.01), "flow": (1.0, 0.3), "edm": (80.0, 0.1)}[name]
    here, there = (at(schedule, time, time) for time in times)
    images, draw = draw_images(2), {"slots": torch.arange(2), **DRAW}
    (xt, x0), (xs, _) = (method.noisy(images, instant, **draw) for instant in (here, there))
    torch.testing.assert_close(ddim_step(xt, x0, here, there), xs, rtol=0, atol=1e-9)
    torch.testing.assert_close(ddim_step(xt, x0, here, there.cleaned(torch.tensor([True, False])))[0], x0[0])


def test_images_are_read_as_the_op_reads_them():
    images = torch.arange(3 * 16, dtype=torch.uint8).view(3, 4, 4, 1)
    here, draw = at(make_schedule("vp"), 0.2, 0.5, 0.9), {"slots": torch.arange(4, 7), **DRAW}
    xt, x0 = Regression(patch_size=2).noisy(images, here, **draw)
    want = ops.noise_visible_patches(
        images, None, here.alpha, here.sigma, patch_size=2, prediction="x0", layout="bhwc", **draw
    )
    assert xt.dtype == torch.float32 and torch.equal(xt, want[0]) and torch.equal(x0, want[1])
    channels_first = Regression(patch_size=2, layout="bchw").noisy(images.permute(0, 3, 1, 2), here, **draw)
    assert torch.equal(channels_first[0], xt)
    mirrored = Regression(patch_size=2, hflip=1.0).noisy(images.flip(2), here, **draw)
    assert torch.equal(mirrored[0], xt)
    assert draw_images(3).dtype == Regression(patch_size=2).noisy(draw_images(3), here, **draw)[0].dtype


@pytest.mark.parametrize(("name", "prediction"), ALL)
def test_guidance_of_each_image_is_that_of_the_denoiser(name, prediction):
    denoiser = exact_denoiser(name, prediction)
    xt, labels = draw_images(3).view(3, 4, 4), torch.tensor([0, 1, 2])
    t = at(denoiser.schedule, *{"edm": (0.1, 1.0, 5.0)}.get(name, (0.3, 0.5, 0.9))).t
    each = guided_x0(denoiser, xt, t, labels, torch.tensor([0.0, 1.5, 4.0]))
    for index, scale in enumerate((1.0, 2.5, 5.0)):
        torch.testing.assert_close(each[index], denoiser(xt, t, labels, Guidance(scale))[index])


def test_the_teacher_is_guided_told_and_clipped_as_configured():
    teacher = exact_denoiser("vp", "v")
    here, xt, labels = at(teacher.schedule, 0.4, 0.6), draw_images(2).view(2, 4, 4), torch.tensor([1, 2])
    w, calls = torch.tensor([0.5, 2.0]), []

    def told(tokens, t, ids_keep, labels, strength):
        calls.append(strength)
        return tokens

    plain = Regression(patch_size=2).estimate(teacher, xt, here, labels, None)
    assert torch.equal(plain, teacher(xt, here.t, labels))
    fixed = Regression(patch_size=2, guidance=Guidance(3.0)).estimate(teacher, xt, here, labels, None)
    assert torch.equal(fixed, teacher(xt, here.t, labels, Guidance(3.0)))
    drawn = Regression(patch_size=2, strengths=(0, 4)).estimate(teacher, xt, here, labels, w)
    assert torch.equal(drawn, guided_x0(teacher, xt, here.t, labels, w))
    clipped = Regression(patch_size=2, strengths=(0, 4), clip=0.2).estimate(teacher, xt, here, labels, w)
    assert torch.equal(clipped, drawn.clamp(-0.2, 0.2)) and not torch.equal(clipped, drawn)
    told_teacher = Denoiser(told, teacher.schedule, "x0")
    method = Regression(patch_size=2, strengths=(0, 4), told_teacher=True)
    assert torch.equal(method.estimate(told_teacher, xt, here, labels, w), xt) and calls == [w]
    with pytest.raises(ValueError, match="strengths need labels"):
        method.estimate(told_teacher, xt, here, None, w)


def test_strengths_are_drawn_evenly_and_each_slot_its_own():
    method, slots = Regression(patch_size=2, strengths=(1.0, 3.0)), torch.arange(4000)
    w = method.strength(slots=slots, **DRAW)
    assert w.min() > 1.0 and w.max() < 3.0
    assert (w.mean() - 2.0).abs() < 4.5 * (2.0 / 12**0.5) * 4000**-0.5
    assert torch.equal(method.strength(slots=slots[7:9], **DRAW), w[7:9])
    assert not torch.equal(method.strength(slots=slots, seed=3, step=9), w)
    assert Regression(patch_size=2).strength(slots=slots, **DRAW) is None


def test_loss_and_gradient():
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    student = Denoiser(lambda tokens, t, ids_keep, labels: scale * tokens, make_schedule("vp"), "x0")
    xt, target = draw_images(2).view(2, 4, 4), draw_images(2, seed=8).view(2, 4, 4)
    weight, here = torch.tensor([2.0, 0.5]), at(student.schedule, 0.3, 0.4)
    out = Regression(patch_size=2).fit(student, target, xt, here, None, None, weight)
    per_image = weight * (0.7 * xt - target).square().mean(dim=(1, 2))
    torch.testing.assert_close(out["loss_per_image"], per_image)
    torch.testing.assert_close(out["loss"], per_image.mean())
    assert not out["loss_per_image"].requires_grad and torch.equal(out["t"], here.t)
    out["loss"].backward()
    want = (weight * (2 * (0.7 * xt - target) * xt).mean(dim=(1, 2))).mean()
    torch.testing.assert_close(scale.grad, want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "prediction"), ALL)
def test_every_schedule_and_prediction(method, name, prediction):
    """The gradient goes to the student alone, whatever the teacher predicts; micro-batches change no loss."""
    schedule, labels = make_schedule(name), torch.tensor([0, 1, 2, -1])
    images = (draw_images(4).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
    teacher = Denoiser(tiny(1), schedule, prediction)
    student = Denoiser(tiny(2), schedule, "v" if prediction == "eps" and method == "progressive" else prediction)
    arguments = [None if method == "consistency-training" else teacher, images, labels]
    out = METHODS[method](student, *arguments, slots=torch.arange(4), **DRAW)
    assert out["loss"].shape == () and out["loss_per_image"].shape == out["t"].shape == (4,)
    assert out["loss"].isfinite() and out["loss"] > 0
    torch.testing.assert_close(out["loss"], out["loss_per_image"].mean())
    out["loss"].backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    grads = [p.grad for p in student.model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)
    part = METHODS[method](
        student, arguments[0], images[2:], labels[2:], slots=torch.arange(2, 4), **DRAW
    )  # fmt: skip
    torch.testing.assert_close(part["loss_per_image"], out["loss_per_image"][2:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["guided", "progressive", "consistency"])
def test_a_told_student_learns_with_each_method(method):
    schedule = make_schedule("vp")
    teacher = Denoiser(tiny(1), schedule, "eps")
    student = Denoiser(GuidedNetwork(tiny(1)), schedule, "v")
    images, labels = draw_images(4).float(), torch.tensor([0, 1, 2, 1])
    from_guidance = dataclasses.replace(METHODS[method], strengths=(0.0, 4.0))
    out = from_guidance(student, teacher, images, labels, slots=torch.arange(4), **DRAW)
    out["loss"].backward()
    assert student.model.strength_embed.grad.abs().sum() > 0
    from_told = dataclasses.replace(from_guidance, told_teacher=True)
    told = Denoiser(GuidedNetwork(tiny(4)), schedule, "v")
    assert from_told(student, told, images, labels, slots=torch.arange(4), **DRAW)["loss"] > 0
    assert told.model.strength_embed.grad is None


@pytest.mark.skipif(not backend.has_native(), reason="the reference backend looks at values on the CPU, to check them")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_values(method, name):
    schedule, step = make_schedule(name), torch.tensor(8)
    prediction = schedule.predictions[0] if schedule.predictions[0] != "eps" else "v"
    student, teacher = Denoiser(GuidedNetwork(tiny(2)), schedule, prediction), Denoiser(tiny(1), schedule, prediction)
    changes = {"hflip": 0.5} if method == "consistency-training" else {"strengths": (0.0, 4.0)}
    if method == "consistency-training":
        student, teacher = teacher, None
    loss = dataclasses.replace(METHODS[method], **changes)
    images, labels = draw_images(4), torch.tensor([0, 1, 2, 1])
    with NoWait():
        loss(student, teacher, images, labels, seed=3, step=step, slots=torch.arange(4))["loss"].backward()


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
@pytest.mark.parametrize(
    ("method", "name"),
    [("guided", "edm"), ("progressive", "linear"), ("consistency", "flow"), ("consistency-training", "vp")],
)
def test_a_step_copies_nothing_between_host_and_device(method, name, monkeypatch):
    """On fake tensors on a GPU. The first step may copy tables of the schedule there."""
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)  # it asks the driver
    schedule = make_schedule(name)
    prediction = schedule.predictions[0] if schedule.predictions[0] != "eps" else "v"
    changes = {} if method == "consistency-training" else {"strengths": (0.0, 4.0)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain, told = (to_fake_cuda(network, "cuda") for network in (tiny(1), GuidedNetwork(tiny(2))))
        student, teacher = (Denoiser(network, schedule, prediction) for network in (told, plain))
        if method == "consistency-training":
            student, teacher = teacher, None
        loss = dataclasses.replace(METHODS[method], **changes)
        images, labels = torch.zeros(4, 4, 4, 1, dtype=torch.uint8, device="cuda"), torch.zeros(4).long().cuda()
        for guard in (contextlib.nullcontext(), testing.NoTransfer()):
            with guard:
                step = torch.full((), 8, device="cuda")
                out = loss(student, teacher, images, labels, seed=3, step=step, slots=torch.arange(4, device="cuda"))
    assert out["loss"].device.type == "cuda"


def test_tell():
    def network(tokens, t, ids_keep, labels, strength):
        return tokens + strength[:, None, None]

    denoiser = Denoiser(network, make_schedule("vp"), "x0")
    xt = torch.zeros(2, 4, 4)
    told = tell(denoiser, torch.tensor([1.0, 2.0]))
    assert told(xt, torch.tensor([0.5, 0.5]))[:, 0, 0].tolist() == [1.0, 2.0]
    assert tell(denoiser, None) is denoiser


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0, want at least 1"),
        ({"layout": "hwc"}, "layout is 'hwc', want 'bhwc' or 'bchw'"),
        ({"hflip": 1.5}, "hflip is 1.5, want a probability"),
        ({"weight": "p2"}, "unknown weight 'p2', want one of none, truncated-snr"),
        ({"clip": 0.0}, "clip is 0.0, want the bound"),
        ({"strengths": (2.0, 1.0)}, r"strengths is \(2.0, 1.0\), want \(least, greatest\)"),
        ({"strengths": (0.0, 1.0), "guidance": Guidance(2.0)}, "strengths and guidance are both given"),
        ({"told_teacher": True}, "told_teacher is set, want the strengths"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        Regression(**({"patch_size": 2} | changes))


@pytest.mark.parametrize("method", METHODS)
def test_schedules_must_be_one(method):
    if method == "consistency-training":
        other = {"teacher": None, "average": exact_denoiser("vp", "v")}
    else:
        other = {"teacher": exact_denoiser("vp", "v")}
    with pytest.raises(ValueError, match="student and teacher have schedules of their own"):
        METHODS[method](exact_denoiser("vp", "v"), images=draw_images(1), slots=torch.arange(1), **other, **DRAW)
