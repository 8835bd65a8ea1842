"""The discriminator in the encoder of the fake network, and the two losses of SiDA."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from maskdm_fast import random
from maskdm_fast.diffusion import make_schedule, patchify
from maskdm_fast.distill import DMD2, METHODS, Critic, CriticHead, GuidanceScales, LevelDraw, Method, SiD, SiDA
from maskdm_fast.distill.critic import estimate_and_logits, logits, noisy_real
from maskdm_fast.distill.networks import add_noise, estimate
from maskdm_fast.distill.sida import mean_weight
from maskdm_fast.models import UViT
from maskdm_fast.random import Stream
from tests.distill.score_toys import CONFIG, LABELS, SLOTS, gradients, narrow, uvit_networks

DRAW = {"seed": 5, "step": 3, "slots": SLOTS}
IMAGES = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(4, 4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.tensor([10, 400, 700, 999])


def with_head(model):
    return Critic(model, CriticHead(CONFIG.dim, seed=4))


def scales_of(networks, t):
    return (scale.double()[:, None, None] for scale in networks.fake.schedule.alpha_sigma(t))


def eps_of_draw():
    return random.normal(192, stream=Stream.NOISE, dtype=torch.float64, **DRAW).view(4, 4, 48)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_tap_of_a_uvit(checkpointing):
    model = UViT(CONFIG, seed=1).double()
    model.activation_checkpointing = checkpointing
    calls, features_of_block = [], []
    for block in model.out_blocks:
        block.register_forward_hook(lambda *arguments: calls.append(1))
    model.mid_block.register_forward_hook(lambda module, inputs, out: features_of_block.append(out))
    features = model(TOKENS, T, None, LABELS, tap="encoder")
    assert features.shape == (4, 4, CONFIG.dim) and not calls
    assert torch.equal(features, features_of_block[0][:, 2:])
    out, same = model(TOKENS, T, None, LABELS, tap="both")
    assert torch.equal(same, features) and torch.equal(out, model(TOKENS, T, None, LABELS))
    features.sum().backward()
    assert model.mid_block.mlp.fc2.weight.grad is not None and model.head.weight.grad is None
    with pytest.raises(ValueError, match="UViT: tap is 'decoder', want 'encoder', 'both' or None"):
        model(TOKENS, T, None, LABELS, tap="decoder")


def test_the_tap_of_packed_tokens():
    model = UViT(CONFIG, seed=1).double()
    ids = torch.tensor([0, 1, 2, 3, 1, 3])
    packed = torch.cat((TOKENS[0], TOKENS[1, [1, 3]]))
    seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    out, features = model(packed, T[:2], ids, LABELS[:2], cu_seqlens=seqlens, tap="both")
    assert out.shape == (6, 48) and features.shape == (6, CONFIG.dim)
    torch.testing.assert_close(features[:4], model(TOKENS[:1], T[:1], None, LABELS[:1], tap="encoder")[0])
    alone = model(TOKENS[1:2, [1, 3]], T[1:2], torch.tensor([[1, 3]]), LABELS[1:2], tap="encoder")
    torch.testing.assert_close(features[4:], alone[0])


def test_logits_are_features_averaged_over_their_width_or_those_of_a_head():
    fake = uvit_networks().fake
    features = fake.model(TOKENS, T, None, LABELS, tap="encoder")
    torch.testing.assert_close(logits(fake, TOKENS, T, LABELS), features.mean(-1))
    critic = dataclasses.replace(fake, model=Critic(fake.model, CriticHead(CONFIG.dim, seed=2).double()))
    got = logits(critic, TOKENS, T, LABELS)
    assert got.shape == (4, 4)
    torch.testing.assert_close(got, critic.model.head(features))
    assert torch.equal(critic(TOKENS, T, LABELS), fake(TOKENS, T, LABELS))
    for scale, calls_wanted in ((1.0, 1), (0.0, 1), (1.5, 2)):
        calls = []
        hook = fake.model.register_forward_pre_hook(lambda *arguments, calls=calls: calls.append(1))
        labels = LABELS.clamp(min=0)
        x0, judged = estimate_and_logits(critic, TOKENS, T, labels, scale)
        hook.remove()
        torch.testing.assert_close(x0, estimate(fake, TOKENS, T, labels, scale))
        torch.testing.assert_close(
            judged, logits(critic, TOKENS, T, torch.full_like(labels, -1) if not scale else labels)
        )
        assert len(calls) == calls_wanted


def test_the_head_begins_the_same_for_a_seed_and_draws_from_no_global_generator():
    state = torch.get_rng_state()
    heads = [CriticHead(16, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(state, torch.get_rng_state())
    first, same, other = (head.fc1.weight for head in heads)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert 0.015 < first.std() < 0.025
    assert all((head.fc1.bias == 0).all() and (head.norm.weight == 1).all() for head in heads)
    with torch.device("meta"):
        assert CriticHead(16).fc2.weight.is_meta


def test_real_and_generated_images_get_the_same_noise():
    networks = uvit_networks()
    alpha, sigma = networks.fake.schedule.alpha_sigma(T)
    x0 = patchify(IMAGES.permute(0, 3, 1, 2).double() / 127.5 - 1, 4)
    want = add_noise(x0, alpha, sigma, **DRAW)
    shape = networks.generator.token_shape
    torch.testing.assert_close(noisy_real(IMAGES, shape, alpha, sigma, dtype=torch.float64, **DRAW), want)
    as_float = IMAGES.double() / 127.5 - 1
    torch.testing.assert_close(noisy_real(as_float, shape, alpha, sigma, dtype=torch.float64, **DRAW), want)
    for images, message in (
        (None, "compares with images of the data set, but images is None"),
        (IMAGES[:, :4], r"images has shape \[4, 4, 8, 3\], want \[B, height, width, C\] with 4 patches of 48 values"),
        (IMAGES[..., :1], r"images has shape \[4, 8, 8, 1\], want"),
    ):
        with pytest.raises(ValueError, match=message):
            noisy_real(images, shape, alpha, sigma, dtype=torch.float64, **DRAW)


@pytest.mark.parametrize("weighting", ["l1", "l1_xt", "karras", "none"])
def test_the_mean_weight_is_that_of_gaussian_data(weighting):
    s, generator = 0.7, torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    x = 0.5 * x
    f = 0.25 / (0.25 + s**2) * (x + s * eps)
    want = {
        "l1": 1 / (f - x).abs().mean(),
        "l1_xt": 1 / (f - x).abs().mean(),
        "karras": 1 / s**2 + 4,
        "none": 1.0,
    }[weighting]
    assert mean_weight(weighting, narrow(s), make_schedule("edm")) == pytest.approx(float(want), rel=0.005)


def test_the_fake_loss_is_that_of_the_formula():
    networks, method = uvit_networks(), SiDA(fake_adversarial=0.7)
    result = method.fake_loss(networks, LABELS, IMAGES, **DRAW)
    result["loss"].backward()
    other = uvit_networks()
    t = result["t"]
    alpha, sigma = scales_of(other, t)
    with torch.no_grad():
        x_g = other.generator(LABELS, **DRAW)
    real = patchify(IMAGES.permute(0, 3, 1, 2).double() / 127.5 - 1, 4)
    xt, real_xt = (alpha * x + sigma * eps_of_draw() for x in (x_g, real))
    weight = (alpha / sigma).square() + 4
    denoising = (weight * (other.fake(xt, t, LABELS) - x_g).square()).sum((1, 2))
    judged, of_real = logits(other.fake, xt, t, LABELS), logits(other.fake, real_xt, t, LABELS)
    critic = 0.5 * (
        F.binary_cross_entropy_with_logits(of_real, torch.ones_like(of_real))
        + F.binary_cross_entropy_with_logits(judged, torch.zeros_like(judged))
    )
    # The mean weight of the denoising loss over the log-normal draw.
    want = denoising.mean() + 0.7 * (math.exp(2.4 + 2 * 1.44) + 4) * critic
    want.backward()
    torch.testing.assert_close(result["loss"], want, rtol=0.03, atol=0)
    torch.testing.assert_close(result["critic_loss"], critic.detach())
    torch.testing.assert_close(result["denoising_loss"], denoising.detach().mean())
    got, expected = (torch.cat([g.flatten() for g in gradients(n.fake.model).values()]) for n in (networks, other))
    assert F.cosine_similarity(got, expected, dim=0) > 0.999
    with pytest.raises(ValueError, match="compares with images of the data set"):
        method.fake_loss(networks, LABELS, **DRAW)


@pytest.mark.parametrize("mode", ["none", "teacher", "lsg", "zero"])
@pytest.mark.parametrize("method", [SiDA, DMD2])
def test_the_discriminator_sees_the_same_labels_of_real_and_generated_images(method, mode):
    """With labels of real images alone it would win by those."""
    networks, seen = uvit_networks("edm", wrap=with_head if method is DMD2 else lambda model: model), []

    def look(module, arguments, keywords):
        if keywords.get("tap"):
            seen.extend(arguments[3].view(-1, len(LABELS)).tolist())

    networks.fake.model.register_forward_pre_hook(look, with_kwargs=True)
    scale = 1.0 if mode in ("none", "zero") else 2.0
    method(guidance=GuidanceScales.of_mode(mode, scale)).fake_loss(networks, LABELS.clamp(min=0), IMAGES, **DRAW)
    first, second = seen
    assert first == second and (set(first) == {-1}) == (method is SiDA and mode == "zero")


@pytest.mark.parametrize("weighting", ["l1", "none"])
def test_the_generator_loss_is_that_of_the_formula(weighting):
    networks, method = uvit_networks(), SiDA(weighting=weighting, adversarial=5.0)
    result = method.generator_loss(networks, LABELS, **DRAW, images_seen=200_000)
    result["loss"].backward()
    other = uvit_networks()
    sid = SiD(alpha=1.0, weighting=weighting)
    first = sid.generator_loss(other, LABELS, **DRAW)
    alpha, sigma = scales_of(other, first["t"])
    xt = alpha * other.generator(LABELS, **DRAW) + sigma * eps_of_draw()
    judged = logits(other.fake, xt, first["t"], LABELS)
    weight = 192 * mean_weight(weighting, sid.levels, other.fake.schedule)
    adversarial = 5.0 * weight * -F.logsigmoid(judged.clamp(-10, 10)).mean()
    want = 0.5 * first["loss"] + 0.5 * adversarial
    want.backward()
    torch.testing.assert_close(result["loss"], want)
    torch.testing.assert_close(result["sid_loss"], first["loss"].detach())
    torch.testing.assert_close(result["adversarial_loss"], adversarial.detach())
    torch.testing.assert_close(
        *(gradients(n.generator.denoiser.model) for n in (networks, other)), rtol=1e-6, atol=1e-8
    )


def test_warm_up():
    method = SiDA()
    assert [method.trains_generator(seen) for seen in (0, 99_999, 100_000)] == [False, False, True]
    for seen, judged in ((100_000, False), (199_999, False), (200_000, True)):
        result = method.generator_loss(uvit_networks(), LABELS, **DRAW, images_seen=seen)
        assert ("adversarial_loss" in result) == judged
        if not judged:
            plain = SiD(alpha=1.0).generator_loss(uvit_networks(), LABELS, **DRAW)
            torch.testing.assert_close(result["loss"], 0.5 * plain["loss"])


def test_the_discriminator_learns_and_moves_the_generator():
    """Trained alone it tells noise-like images from real ones, and the generator's images then learn to pass."""
    networks = uvit_networks(dtype=torch.float32)
    method = SiDA(fake_adversarial=30.0, adversarial=1e3, levels=LevelDraw("karras", 0.05, 1.0))
    images = torch.zeros(16, 8, 8, 3)
    draw = {"seed": 5, "slots": torch.arange(16)}
    models = networks.fake.model, networks.generator.denoiser.model
    optimizers = [torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.0, 0.99)) for model in models]

    def train(which, loss, steps):
        results = []
        for step in steps:
            results.append(loss(step))
            optimizers[which].zero_grad()
            results[-1]["loss"].backward()
            optimizers[which].step()
        return results

    fake = train(0, lambda step: method.fake_loss(networks, None, images, **draw, step=step), range(40))
    assert fake[-1]["critic_loss"] < 0.7 * fake[0]["critic_loss"]
    late = {"images_seen": 10**6}
    generator = train(1, lambda step: method.generator_loss(networks, None, **draw, step=step, **late), range(40, 60))
    assert generator[-1]["adversarial_loss"] < 0.7 * generator[0]["adversarial_loss"]


def test_methods_by_name():
    for name, method in METHODS.items():
        made = method()
        assert type(made).__name__.lower() == name
        for part in (part for part in vars(Method) if not part.startswith("_")):
            assert hasattr(made, part), f"{name} has no {part}"
    assert [METHODS[name]().needs_images for name in ("sid", "sida", "dmd2")] == [False, True, True]
