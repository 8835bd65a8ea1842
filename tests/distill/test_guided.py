import pytest
import torch

from maskdm_fast.diffusion import Denoiser, Guidance, TimestepDraw, make_schedule, sample
from maskdm_fast.distill.guided import GuidedDistillation, GuidedNetwork
from maskdm_fast.distill.regression import Instant
from maskdm_fast.models import UViT, UViTConfig
from tests.distill.gaussians import ALL, DRAW, SHAPE, draw_images, exact_denoiser

LABELS = torch.tensor([0, 1, 2, 1])


def tiny(seed=1, **changes):
    return UViT(UViTConfig(**(SHAPE | {"dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3} | changes)), seed=seed)


def spoken(network):
    """The same, with a matrix that is no longer zero."""
    with torch.no_grad():
        network.strength_embed.copy_(torch.linspace(-0.1, 0.1, network.strength_embed.numel()).view(16, 16))
    return network


@pytest.mark.parametrize("time_mlp", [False, True])
def test_the_student_begins_as_its_teacher(time_mlp):
    teacher = tiny(time_mlp=time_mlp)
    student = GuidedNetwork(teacher)
    tokens, t = draw_images(4).float().view(4, 4, 4), torch.tensor([1, 10, 500, 999])
    for w in (0.0, 3.7):
        strength = torch.full((4,), w)
        assert torch.equal(student(tokens, t, None, LABELS, strength=strength), teacher(tokens, t, None, LABELS))


def test_the_strength_is_heard():
    student = spoken(GuidedNetwork(tiny()))
    tokens, t = draw_images(4).float().view(4, 4, 4), torch.tensor([1, 10, 500, 999])
    w = torch.tensor([0.0, 1.0, 2.5, 4.0])
    out = student(tokens, t, None, LABELS, strength=w)
    for index, value in enumerate(w.tolist()):
        fixed = student.at(value)
        torch.testing.assert_close(fixed(tokens, t, None, LABELS)[index], out[index])
        torch.testing.assert_close(fixed(tokens, fixed.time_tokens(t), None, LABELS)[index], out[index])
    assert (student(tokens, t, None, LABELS, strength=w + 0.5) - out).abs().amax(dim=(1, 2)).min() > 1e-4
    out.sum().backward()
    assert student.strength_embed.grad.abs().sum() > 0


def test_packed_tokens_pass_through():
    student = spoken(GuidedNetwork(tiny()))
    tokens, t, w = draw_images(2).float().view(2, 4, 4), torch.tensor([3, 30]), torch.tensor([1.0, 2.0])
    ids = torch.arange(4).repeat(2)
    packed = student(tokens.flatten(0, 1), t, ids, LABELS[:2], torch.tensor([0, 4, 8], dtype=torch.int32), strength=w)
    torch.testing.assert_close(packed.view(2, 4, 4), student(tokens, t, None, LABELS[:2], strength=w))


def test_sampling_at_a_strength():
    schedule, network = make_schedule("cosine"), spoken(GuidedNetwork(tiny()))
    arguments = {
        "num_images": 4,
        **SHAPE,
        "num_steps": 3,
        "seed": 0,
        "batch_size": 2,
        "as_float": True,
        "labels": LABELS,
    }
    images = sample(Denoiser(network.at(2.0), schedule, "v"), **arguments)

    def told(tokens, t, ids_keep, labels):
        return network(tokens, t, ids_keep, labels, strength=torch.full(t.shape, 2.0))

    torch.testing.assert_close(images, sample(Denoiser(told, schedule, "v"), **arguments))
    assert not torch.equal(images, sample(Denoiser(network.at(1.0), schedule, "v"), **arguments))


def test_initial_values():
    with torch.device("meta"):
        network = GuidedNetwork(tiny())
    assert network.strength_embed.is_meta
    want = GuidedNetwork(tiny(seed=5)).state_dict()
    assert all(torch.equal(network.initial_value(name, 5), value) for name, value in want.items())


@pytest.mark.parametrize(("name", "prediction"), ALL)
def test_the_target_is_linear_in_the_strength(name, prediction):
    teacher = exact_denoiser(name, prediction)
    method = GuidedDistillation(patch_size=2)
    t = torch.tensor({"edm": (0.1, 1.0, 5.0, 40.0)}.get(name, (0.1, 0.3, 0.5, 0.9)))
    here, xt = Instant.at(teacher.schedule, t), draw_images(4).view(4, 4, 4)
    at = {w: method.estimate(teacher, xt, here, LABELS, torch.full((4,), w)) for w in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[0.0], teacher(xt, here.t, LABELS))
    torch.testing.assert_close(at[3.0] - at[0.0], 3.0 * (at[1.0] - at[0.0]))
    torch.testing.assert_close(at[1.0] - at[0.0], at[0.0] - teacher(xt, here.t, torch.full((4,), -1)))


@pytest.mark.parametrize(("name", "prediction"), ALL)
@pytest.mark.parametrize("timesteps", [TimestepDraw(num_strata=32), TimestepDraw("lognormal")], ids=lambda d: d.kind)
def test_the_loss_is_zero_at_the_guided_denoiser_alone(name, prediction, timesteps):
    schedule, labels = make_schedule(name), LABELS.repeat(8)
    method = GuidedDistillation(patch_size=2, timesteps=timesteps)
    images, teacher = draw_images(32, labels), exact_denoiser(name, prediction, schedule)
    arguments = {"images": images, "labels": labels, "slots": torch.arange(32), **DRAW}
    for of_student in schedule.predictions:
        out = method(exact_denoiser(name, of_student, schedule), teacher, **arguments)
        assert out["loss_per_image"].max() < 1e-12

    def deaf(tokens, t, ids_keep, labels, strength):
        return teacher.model(tokens, t, ids_keep, labels)

    assert method(Denoiser(deaf, schedule, prediction), teacher, **arguments)["loss"] > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_student_of_another_prediction(guidance):
    """Without strengths, v is learned from eps; with a fixed guidance, that goes into the student as well."""
    schedule = make_schedule("linear")
    teacher, method = exact_denoiser("linear", "eps", schedule), GuidedDistillation(
        patch_size=2, strengths=None, guidance=Guidance(guidance)
    )  # fmt: skip

    def x0(tokens, t, alpha, sigma, labels, strength):
        return teacher(tokens, t, labels, Guidance(guidance))

    student = exact_denoiser("linear", "v", schedule, x0)
    out = method(student, teacher, draw_images(4, LABELS), LABELS, slots=torch.arange(4), **DRAW)
    assert out["loss_per_image"].max() < 1e-12


def test_levels_below_the_least_are_those_of_the_least():
    """There the weight has no bound: at t = 1e-7 of a flow it would be 1e14."""
    teacher = exact_denoiser("flow", "flow")
    method = GuidedDistillation(patch_size=2, timesteps=TimestepDraw("lognormal", -20.0, 0.1))
    out = method(teacher, teacher, draw_images(4, LABELS), LABELS, slots=torch.arange(4), **DRAW)
    torch.testing.assert_close((-0.5 * teacher.schedule.log_snr(out["t"])).exp(), torch.full((4,), 0.002).double())


def test_training_reaches_guidance():
    """A linear network of the time token learns what guidance adds to the teacher, at every strength."""
    schedule, num = make_schedule("vp"), 128
    gap = torch.linspace(-0.4, 0.4, 16).view(4, 4)

    class Network(torch.nn.Module):
        """x0 as the teacher has it, plus what the time token says."""

        config = UViTConfig(**SHAPE, dim=16, depth=3, num_heads=2, num_classes=3)

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Parameter(torch.eye(16))

        def time_tokens(self, t):
            return torch.zeros(len(t), 16)

        def forward(self, tokens, t, ids_keep=None, labels=None, cu_seqlens=None):
            return 0.3 * tokens + ((labels >= 0)[:, None] * gap.flatten() + t @ self.head).view(-1, 4, 4)

    teacher = Denoiser(lambda tokens, t, i, labels: 0.3 * tokens + (labels >= 0)[:, None, None] * gap, schedule, "x0")
    network = GuidedNetwork(Network())
    method = GuidedDistillation(patch_size=2, weight="none", strengths=(0.0, 3.0))
    images, labels = draw_images(num).float(), LABELS.repeat(num // 4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 400)
        out = method(
            Denoiser(network, schedule, "x0"), teacher, images, labels, slots=torch.arange(num), seed=1, step=step
        )
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 1e-3 * losses[0]
    xt, t = images[:4].view(4, 4, 4), torch.full((4,), 0.5)
    for w in (0.0, 0.7, 1.5, 3.0):
        x0 = Denoiser(network.at(w), schedule, "x0")(xt, t, LABELS)
        torch.testing.assert_close(x0, teacher(xt, t, LABELS, Guidance(1.0 + w)), rtol=0.0, atol=0.05)


def test_errors():
    with pytest.raises(ValueError, match="the network has num_classes=0, want classes"):
        GuidedNetwork(tiny(num_classes=0))
    teacher = exact_denoiser("vp", "v")
    with pytest.raises(ValueError, match="strengths need labels"):
        GuidedDistillation(patch_size=2)(teacher, teacher, draw_images(1), slots=torch.arange(1), **DRAW)
    with pytest.raises(ValueError, match="guidance needs labels"):
        GuidedDistillation(patch_size=2, strengths=None, guidance=Guidance(2.0))(
            teacher, teacher, draw_images(1), slots=torch.arange(1), **DRAW
        )
