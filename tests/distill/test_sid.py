"""Score distillation of tiny U-ViTs: what has a gradient, what is computed, and what a batch's make-up changes."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, make_schedule
from maskdm_fast.distill import (
    DMD2,
    METHODS,
    Critic,
    CriticHead,
    FakeScore,
    Generator,
    GuidanceScales,
    LevelDraw,
    Networks,
    SiD,
    SiDA,
    clean_gradients,
    falling_levels,
    frozen,
)
from maskdm_fast.distill.networks import estimate
from maskdm_fast.ops.flop_formulas import register_flop_formulas
from maskdm_fast.random import Stream
from tests.distill.score_toys import CONFIG, LABELS, SLOTS, gradients, uvit_networks
from tests.train.test_waits import NoWait

DRAW = {"seed": 5, "step": 3, "slots": SLOTS}
IMAGES = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LATE = {"images_seen": 10**9}


def with_head(model):
    return Critic(model, CriticHead(CONFIG.dim, seed=4))


def networks_of(method, **options):
    return uvit_networks(wrap=with_head, **options) if isinstance(method, DMD2) else uvit_networks(**options)


def plain_loss(method, networks, x_g, labels):
    """The generator's loss of SiD in a few lines, from its images on."""
    schedule, step = networks.teacher.schedule, {**DRAW, "slots": torch.arange(len(x_g))}
    t = method.levels(schedule, **step)
    alpha, sigma = (scale.to(x_g.dtype)[:, None, None] for scale in schedule.alpha_sigma(t))
    eps = random.normal(x_g[0].numel(), stream=Stream.NOISE, dtype=x_g.dtype, **step).view(x_g.shape)
    xt = alpha * x_g + sigma * eps
    teacher, fake = networks.teacher(xt, t, labels), networks.fake(xt, t, labels)
    size = {
        "l1": (teacher - x_g).abs().mean((1, 2), keepdim=True),
        "l1_xt": (teacher - xt / alpha).abs().mean((1, 2), keepdim=True),
        "karras": 1 / ((alpha / sigma) ** 2 + 4),
        "none": torch.ones(1, dtype=x_g.dtype),
    }[method.weighting].detach()
    d, e = teacher - fake, teacher - x_g
    return method.scale * (d * (e - method.alpha * d) / size).sum((1, 2)).mean()


@pytest.mark.parametrize("weighting", ["l1", "l1_xt", "karras", "none"])
@pytest.mark.parametrize(
    ("schedule", "prediction"), [("cosine", "v"), ("linear", "eps"), ("flow", None), ("edm", None)]
)
def test_the_loss_is_that_of_the_formula(schedule, prediction, weighting):
    networks, method = uvit_networks(schedule, prediction), SiD(weighting=weighting, alpha=1.2)
    result = method.generator_loss(networks, LABELS, **DRAW)
    result["loss"].backward()
    got = gradients(networks.generator.denoiser.model)
    other = uvit_networks(schedule, prediction)
    want = plain_loss(method, other, other.generator(LABELS, **DRAW), LABELS)
    want.backward()
    torch.testing.assert_close(result["loss"], want)
    torch.testing.assert_close(result["loss_per_image"].mean(), want.detach())
    torch.testing.assert_close(got, gradients(other.generator.denoiser.model), rtol=1e-6, atol=1e-8)
    assert all(grad is not None and grad.abs().sum() > 0 for name, grad in got.items() if "label" not in name)
    assert all(grad is not None for grad in gradients(other.teacher.model).values()), "the plain loss does compute them"


def test_nothing_to_learn_from_a_fake_network_that_is_the_teacher():
    for alpha in (0.0, 0.5, 1.2):
        networks = uvit_networks(same=True)
        result = SiD(alpha=alpha).generator_loss(networks, LABELS, **DRAW)
        result["loss"].backward()
        assert result["loss"] == 0 and (result["distance_per_image"] == 0).all()
        assert max(grad.abs().max() for grad in gradients(networks.generator.denoiser.model).values()) <= 1e-12


@pytest.mark.parametrize("method", [SiD(), SiDA(), DMD2(), DMD2(adversarial=0.0, fake_adversarial=0.0)], ids=str)
def test_only_the_network_being_stepped_gets_gradients(method):
    networks = networks_of(method)
    models = [networks.teacher.model, networks.fake.model, networks.generator.denoiser.model]
    method.fake_loss(networks, LABELS, IMAGES, **DRAW)["loss"].backward()
    assert [any(grad is not None for grad in gradients(model).values()) for model in models] == [False, True, False]
    judged = not isinstance(method, DMD2) or method.needs_images
    without = {name for name, grad in gradients(models[1]).items() if grad is None}
    assert without == set() if judged else all("head" in name for name in without)
    for parameter in models[1].parameters():
        parameter.grad = None
    method.generator_loss(networks, LABELS, **DRAW, **LATE)["loss"].backward()
    assert [any(grad is not None for grad in gradients(model).values()) for model in models] == [False, False, True]
    assert all(parameter.requires_grad for model in models for parameter in model.parameters())


class Stored:
    """In this context, how many bytes the backward pass keeps, but for parameters; each memory counts once."""

    def __init__(self, networks):
        models = (networks.teacher.model, networks.fake.model, networks.generator.denoiser.model)
        self.parameters = {parameter.data_ptr() for model in models for parameter in model.parameters()}
        self.memory = {}
        self.hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        if tensor.data_ptr() not in self.parameters:
            self.memory[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def num_bytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self.memory.values())


def backward_flops_and_bytes(networks, forward):
    stored = Stored(networks)
    with stored.hooks:
        loss = forward()
    num_bytes = stored.num_bytes
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops(), num_bytes


def test_weight_gradients_of_teacher_and_fake_are_neither_computed_nor_stored(monkeypatch):
    """A Linear of M tokens costs 2 M I O for the gradient of its weight, for which it has to keep M I values."""
    register_flop_formulas()
    networks, method = uvit_networks(dtype=torch.float32), SiD()

    def generator_loss():
        return method.generator_loss(networks, LABELS, **DRAW)["loss"]

    flops, num_bytes = backward_flops_and_bytes(networks, generator_loss)
    models = (networks.teacher.model, networks.fake.model)
    assert all(grad is None for model in models for grad in gradients(model).values())
    monkeypatch.setattr("maskdm_fast.distill.sid.frozen", lambda *models: frozen())
    all_flops, all_bytes = backward_flops_and_bytes(networks, generator_loss)
    assert all(grad is not None for model in models for grad in gradients(model).values())

    dim, num_patches = CONFIG.dim, 4 * CONFIG.num_tokens
    num_tokens, num_skips = num_patches + 4 * CONFIG.num_extras, CONFIG.num_blocks // 2
    of_weights = CONFIG.num_blocks * 12 * dim**2 * num_tokens  # qkv 3, proj 1, MLP 8
    of_weights += num_skips * 2 * dim**2 * num_tokens + CONFIG.token_dim * dim * (num_patches + num_tokens)
    assert all_flops - flops == 2 * 2 * of_weights
    # The inputs of qkv and fc1 are not used by anything else, that of fc2 neither; float32.
    assert all_bytes - num_bytes >= 2 * 4 * CONFIG.num_blocks * num_tokens * (1 + 1 + 4) * dim


@pytest.mark.parametrize("name", list(METHODS))
def test_micro_batches_change_nothing(name):
    method = METHODS[name]()

    def run(loss, parts):
        networks = networks_of(method)
        total = 0.0
        for part in parts:
            result = loss(networks, LABELS[part], IMAGES[part], {**DRAW, "slots": SLOTS[part]})
            (result["loss"] * len(SLOTS[part]) / 4).backward()
            total += result["loss"].item() * len(SLOTS[part]) / 4
        return total, {**gradients(networks.fake.model), **gradients(networks.generator.denoiser.model)}

    def fake(networks, labels, images, draw):
        return method.fake_loss(networks, labels, images, **draw)

    def generator(networks, labels, images, draw):
        return method.generator_loss(networks, labels, **draw, **LATE)

    for loss in (fake, generator):
        whole, parts = run(loss, [slice(0, 4)]), run(loss, [slice(0, 1), slice(1, 4)])
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(METHODS))
def test_nothing_waits_for_the_device(name):
    """The first update works out constants of the schedule on the host; after that no value is read."""
    method = METHODS[name](guidance=GuidanceScales(teacher=2.0, label_drop=0.1))
    networks, labels = networks_of(method, levels=falling_levels(2.5, 2)), LABELS.clamp(min=0)

    def update(step):
        draw = {**DRAW, "step": step}
        method.fake_loss(networks, labels, IMAGES, **draw)["loss"].backward()
        method.generator_loss(networks, labels, **draw, **LATE)["loss"].backward()
        clean_gradients(networks.fake.model.parameters(), clip=1.0)

    update(0)
    with NoWait():
        update(1)


def test_the_number_of_the_update_may_be_a_tensor():
    """As in a captured graph."""
    method, networks = SiD(), uvit_networks(levels=falling_levels(2.5, 2))
    draw = {**DRAW, "step": torch.tensor(DRAW["step"])}
    assert torch.equal(*(method.fake_loss(networks, LABELS, **d)["loss"] for d in (DRAW, draw)))
    assert torch.equal(*(method.generator_loss(networks, LABELS, **d)["loss"] for d in (DRAW, draw)))


@pytest.mark.parametrize("name", list(METHODS))
def test_under_autocast(name):
    """The networks compute in bfloat16, estimates and losses stay in float32."""
    method = METHODS[name]()
    for update in ("fake_loss", "generator_loss"):
        networks, losses = networks_of(method, dtype=torch.float32), []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                if update == "fake_loss":
                    losses.append(method.fake_loss(networks, LABELS, IMAGES, **DRAW)["loss"])
                else:
                    losses.append(method.generator_loss(networks, LABELS, **DRAW, **LATE)["loss"])
        assert all(loss.dtype == torch.float32 for loss in losses)
        torch.testing.assert_close(*losses, rtol=0.2, atol=0)
        losses[1].backward()


class Broken(torch.nn.Module):
    """A network that overflows on the images of class 2."""

    def __init__(self, network, value):
        super().__init__()
        self.network, self.value = network, value

    def forward(self, tokens, t, ids_keep=None, labels=None, **tap):
        # A product, so that the gradient to the tokens is no number either.
        factor = torch.where(labels == 2, self.value, 1.0).to(tokens.dtype)[:, None, None]
        out = self.network(tokens * factor, t, ids_keep, labels, **tap)
        return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["teacher", "fake"])
@pytest.mark.parametrize("name", list(METHODS))
def test_an_image_that_is_no_number_counts_as_zero(name, broken, value):
    method = METHODS[name]()
    good = networks_of(method)
    denoiser = getattr(good, broken)
    bad = dataclasses.replace(good, **{broken: dataclasses.replace(denoiser, model=Broken(denoiser.model, value))})
    result = method.generator_loss(bad, LABELS, **DRAW, **LATE)
    result["loss"].backward()
    got = gradients(good.generator.denoiser.model)
    other = networks_of(method)
    rest = torch.tensor([0, 2, 3])
    want = method.generator_loss(other, LABELS[rest], **{**DRAW, "slots": SLOTS[rest]}, **LATE)
    (want["loss"] * 0.75).backward()
    assert result["finite_share"] == 0.75 and result["loss_per_image"][1] == 0 and result["distance_per_image"][1] == 0
    torch.testing.assert_close(result["loss"], want["loss"] * 0.75)
    torch.testing.assert_close(got, gradients(other.generator.denoiser.model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_fake_network_is_not_trained_on_an_image_that_is_no_number(name):
    method = METHODS[name]()
    good = networks_of(method)
    student = good.generator.denoiser
    broken = dataclasses.replace(student, model=Broken(student.model, float("nan")))
    bad = dataclasses.replace(good, generator=dataclasses.replace(good.generator, denoiser=broken))
    result = method.fake_loss(bad, LABELS, IMAGES, **DRAW)
    result["loss"].backward()
    assert result["loss_per_image"][1] == 0 and result["loss"] > 0
    got, other = gradients(good.fake.model), networks_of(method)
    rest = torch.tensor([0, 2, 3])
    want = method.fake_loss(other, LABELS[rest], IMAGES[rest], **{**DRAW, "slots": SLOTS[rest]})
    (want["loss"] * 0.75).backward()
    torch.testing.assert_close(result["loss"], want["loss"] * 0.75)
    torch.testing.assert_close(got, gradients(other.fake.model), rtol=1e-6, atol=1e-9)
    # The generator's own overflow is left to `clean_gradients`: its loss is right all the same.
    result = method.generator_loss(bad, LABELS, **DRAW, **LATE)
    assert result["finite_share"] == 0.75 and torch.isfinite(result["loss"])


def test_clean_gradients():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    clean_gradients([parameter, torch.nn.Parameter(torch.zeros(1))])
    assert parameter.grad.tolist() == [0.0, 1e5, -1e5, 2.0]
    clean_gradients([parameter], clip=1.0)
    assert parameter.grad.tolist() == [0.0, 1.0, -1.0, 1.0]


def test_alpha_takes_off_the_distance():
    """L_a - L_b = (b - a) |d|^2, for each image."""
    results = [
        SiD(alpha=alpha, weighting="none", scale=1.0).generator_loss(uvit_networks(), LABELS, **DRAW)
        for alpha in (0.3, 1.1)
    ]
    difference = results[0]["loss_per_image"] - results[1]["loss_per_image"]
    torch.testing.assert_close(difference, 0.8 * 192 * results[0]["distance_per_image"])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_weights_of_the_fake_network(prediction):
    """Without a weight the loss is the squared error of the network's own output."""
    networks = uvit_networks("linear", prediction)
    fake_score = FakeScore(LevelDraw("uniform"), weight=type(FakeScore().weight)("none"), reduction="mean")
    result = SiD(fake_score=fake_score).fake_loss(networks, LABELS, **DRAW)
    x_g = networks.generator(LABELS, **DRAW)
    alpha, sigma = (scale.double()[:, None, None] for scale in networks.fake.schedule.alpha_sigma(result["t"]))
    eps = random.normal(192, stream=Stream.NOISE, dtype=torch.float64, **DRAW).view(4, 4, 48)
    target = eps if prediction == "eps" else alpha * eps - sigma * x_g
    out = networks.fake.model(alpha * x_g + sigma * eps, result["t"], None, LABELS)
    want = (out - target).square().mean((1, 2)).detach()
    torch.testing.assert_close(result["loss_per_image"], want, rtol=1e-4, atol=1e-6)


def test_refuses():
    denoiser = Denoiser(torch.nn.Identity(), make_schedule("linear"))
    for build, message in (
        (lambda: SiD(weighting="l2"), "unknown weighting 'l2', want one of l1, l1_xt, karras, none"),
        (lambda: Generator(denoiser, (1, 2), (1.0, 2.0)), "the noise levels of the generator are"),
        (lambda: Generator(denoiser, (1, 2), ()), "want at least one, and falling"),
        (lambda: Generator(denoiser, (1, 2), (90.0,)), "the noise level sigma/alpha is 90, but DiscreteSchedule"),
        (lambda: Generator(denoiser, (1, 2), trained_steps="two"), "trained_steps is 'two', want one of all, one"),
        (lambda: FakeScore(reduction="max"), "reduction is 'max', want 'sum' or 'mean'"),
        (lambda: GuidanceScales(label_drop=2.0), "label_drop is 2.0, want a probability"),
        (
            lambda: Networks(denoiser, Denoiser(denoiser.model, make_schedule("cosine")), Generator(denoiser, (1, 2))),
            "teacher and fake have different noise schedules",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match="guidance needs labels"):
        estimate(denoiser, torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64), None, 2.0)
