"""Values, energies and anomaly scores."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskdm_fast import ops, random
from maskdm_fast.distill.dxmi import DxMINetworks, update_loss
from maskdm_fast.distill.dxmi_anomaly import (
    FEATURES,
    AutoencoderEnergy,
    SphereMean,
    VectorValue,
    anomaly_scores,
    auroc,
    latent_starts,
)
from maskdm_fast.distill.dxmi_image_values import ResNetValue, ViTValue, ViTValueConfig
from maskdm_fast.distill.dxmi_networks import PointDenoiser, PointValue
from maskdm_fast.distill.dxmi_policy import GaussianPolicy
from maskdm_fast.distill.dxmi_rollout import adapt_velocity, draw, rollout
from maskdm_fast.distill.networks import frozen
from maskdm_fast.random import Stream

VIT = ViTValueConfig(image_size=16, patch_size=4, stem=8, dim=32, depth=2, num_heads=2)


def tokens(num, count, dim, step=0):
    draws = random.normal(count * dim, seed=0, stream=Stream.NOISE, step=step, slots=torch.arange(num))
    return draws.view(num, count, dim)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: PointDenoiser(2, 5, hidden=8, seed=seed),
        lambda seed: PointValue(2, 6, hidden=8, seed=seed),
        lambda seed: ResNetValue(8, 4, width=4, seed=seed),
        lambda seed: ViTValue(VIT, seed=seed),
        lambda seed: AutoencoderEnergy(6, latent=3, hidden=8, seed=seed),
        lambda seed: VectorValue(6, 5, hidden=8, seed=seed),
    ],
)
def test_initial_weights_come_from_the_seed_alone(make):
    state = torch.random.get_rng_state()
    first, again, other = make(3), make(3), make(7)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    drawn = [a.flatten()[:4] for a, _, _ in pairs if a.numel() >= 8 and a.std() > 0]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def test_points_know_the_time_or_do_not():
    x = tokens(4, 1, 2)
    timed, timeless = PointValue(2, 6, hidden=8), PointValue(2, 0, hidden=8)
    first, last = torch.zeros(4, dtype=torch.int64), torch.full((4,), 5)
    assert timed(x, first).shape == (4,)
    assert not torch.equal(timed(x, first), timed(x, last))
    assert torch.equal(timeless(x, first), timeless(x, last))
    mixed = torch.tensor([0, 5, 0, 5])
    want = torch.where(mixed == 0, timed(x, first), timed(x, last))
    torch.testing.assert_close(timed(x, mixed), want)
    denoiser = PointDenoiser(2, 5, hidden=8)
    assert torch.equal(denoiser(x, first), denoiser(x, torch.full((4,), 0.2)))
    assert denoiser(x, first).shape == x.shape


def test_resnet_has_the_published_size_and_no_norm():
    value = ResNetValue(32, 4)
    assert sum(parameter.numel() for parameter in value.parameters()) == pytest.approx(5.13e6, rel=2e-3)
    assert not any("Norm" in type(module).__name__ for module in value.modules())


@pytest.mark.parametrize(
    "make",
    [
        lambda side: ResNetValue(side, 4, width=4),
        lambda side: ViTValue(ViTValueConfig(image_size=side, patch_size=4, stem=8, dim=32, depth=1, num_heads=2)),
    ],
)
def test_image_values(make):
    value, index = make(16), torch.zeros(3, dtype=torch.int64)
    x = tokens(3, 16, 48).requires_grad_(True)
    out = value(x, index)
    assert out.shape == (3,)
    torch.testing.assert_close(value(x[1:2], index[:1])[0], out[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(value(x, index + 1), out)
    optimizer = torch.optim.SGD(value.parameters(), lr=0.1)
    out.square().sum().backward() if out.abs().sum() else (out - 1).square().sum().backward()
    optimizer.step()  # the last layer of the transformer starts at 0
    value(x, index).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in value.parameters())
    assert x.grad.abs().sum() > 0


def test_resnet_adds_up_what_is_positive():
    value, x = ResNetValue(16, 4, width=4), tokens(3, 16, 48)
    seen = []
    value.blocks[-1].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        value.scale.fill_(2.0)
        value.shift.fill_(0.5)
        out = value(x, torch.zeros(3, dtype=torch.int64))
    (last,) = seen
    assert last.shape == (3, 8, 2, 2) and (last < 0).any()  # its rectifier leaks
    features = 4.0 * last.clamp(min=0).sum((2, 3))
    torch.testing.assert_close(out, 2.0 * value.head(features)[:, 0].detach() + 0.5)


def test_resnet_features_do_not_grow_with_the_image():
    small, large = ResNetValue(64, 4, width=4), ResNetValue(128, 4, width=4)
    large.load_state_dict(small.state_dict())
    features = []
    for network, num in ((small, 256), (large, 1024)):
        network.head.register_forward_pre_hook(lambda module, args: features.append(args[0].norm()))
        network(torch.full((1, num, 48), 0.3), torch.zeros(1, dtype=torch.int64))
    # But for the border, where zeros lie around the image; a plain sum would be 4 times as large.
    assert 0.8 < features[1] / features[0] < 1.25


def test_vit_value_starts_in_the_bounds_and_hears_the_amplitude():
    value, x = ViTValue(VIT), tokens(2, 16, 48)
    index = torch.zeros(2, dtype=torch.int64)
    assert (value(x, index) == 0).all()
    with torch.no_grad():
        value.head.weight.copy_(torch.linspace(-1, 1, 32)[None])
    assert (value(x, index) - value(2 * x, index)).abs().min() > 1e-3
    timed = ViTValue(ViTValueConfig(**(vars(VIT) | {"num_times": 5})))
    with torch.no_grad():
        timed.head.weight.copy_(torch.linspace(-1, 1, 32)[None])
    assert (timed(x, index) - timed(x, index + 4)).abs().min() > 1e-3


@pytest.mark.parametrize("make", [lambda: ResNetValue(16, 4, width=6), lambda: ViTValue(VIT)])
def test_flops_of_image_values(make):
    """Convolutions and matrix products are all that the counter counts."""
    value, x, index = make(), tokens(2, 16, 48), torch.zeros(2, dtype=torch.int64)
    ops.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        value(x, index)
    assert counter.get_total_flops() == 2 * value.flops


@pytest.mark.parametrize("make", [lambda: ResNetValue(16, 4, width=6), lambda: ViTValue(VIT)])
def test_image_values_in_half_precision(make):
    """Weights or products of bfloat16 take images of float32, and what comes out was not rounded to bfloat16."""
    value, x, index = make(), tokens(3, 16, 48), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        value.head.weight.fill_(0.01)
        value.scale.fill_(1.001)
    want = value(x, index)
    with torch.autocast("cpu", torch.bfloat16):
        products = value(x, index)
    weights = value.to(torch.bfloat16)(x, index)
    for out in (products, weights):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, want, rtol=0.05, atol=0.01)
    assert not torch.equal(products, products.bfloat16().float())


def test_wrong_shapes():
    for call in (
        lambda: ResNetValue(12, 4),
        lambda: ResNetValue(16, 3),
        lambda: ViTValueConfig(image_size=10, patch_size=4),
        lambda: ViTValueConfig(image_size=8, patch_size=4, dim=30, num_heads=4),
    ):
        with pytest.raises(ValueError, match="want"):
            call()


def test_auroc_by_hand():
    assert auroc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])) == 1.0
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0, 2.0])) == 0.0
    assert auroc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auroc(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx((0.5 + 0.75) / 2)
    with pytest.raises(ValueError, match="at least one"):
        auroc(torch.zeros(0), torch.zeros(1))


def unit_vectors(num, step, *, spread):
    """Directions around one axis of six."""
    axis = torch.tensor([1.0, 0, 0, 0, 0, 0])
    noise = random.normal(6, seed=1, stream=Stream.NOISE, step=step, slots=torch.arange(num))
    return torch.nn.functional.normalize(axis + spread * noise, dim=1)


def test_starts_lie_on_the_sphere_and_near_the_data():
    energy, data = AutoencoderEnergy(6, latent=3, hidden=16), unit_vectors(8, 0, spread=0.1)
    options = {"seed": 0, "step": 2, "slots": torch.arange(8)}
    starts = latent_starts(energy, data, **options)
    torch.testing.assert_close(starts.norm(dim=1), torch.ones(8))
    still = latent_starts(energy, data, max_std=0.0, **options)
    torch.testing.assert_close(still, energy.decode(energy.encode(data)).detach())
    assert (starts - still).abs().amax(1).min() > 0
    part = latent_starts(energy, data[3:], seed=0, step=2, slots=torch.arange(3, 8))
    torch.testing.assert_close(part, starts[3:])


def test_starts_are_moved_in_the_latent_space():
    """By normal noise, whose standard deviation is uniform from 0 to `max_std`."""
    energy, data = AutoencoderEnergy(6, latent=3, hidden=16), unit_vectors(8, 0, spread=0.1)
    options = {"seed": 0, "step": 2, "slots": torch.arange(8)}
    noise = random.normal(3, stream=Stream.LATENT_NOISE, **options)
    share = random.uniform(1, stream=Stream.LATENT_LEVEL, **options)
    for more, max_std in (({}, 0.3), ({"max_std": 2.0}, 2.0)):
        latent = torch.nn.functional.normalize(energy.encode(data) + max_std * share * noise, dim=1)
        torch.testing.assert_close(latent_starts(energy, data, **more, **options), energy.decode(latent).detach())


def test_the_energy_of_an_autoencoder_is_its_error_times_the_square_of_its_scale():
    energy, data = AutoencoderEnergy(6, latent=3, hidden=16), unit_vectors(8, 0, spread=0.1)
    error = (data - energy.decode(energy.encode(data))).square().mean(1)
    with torch.no_grad():
        energy.scale.fill_(-3.0)
    torch.testing.assert_close(energy(data), 9.0 * error)
    assert (energy.encode(data).norm(dim=1) - 1).abs().max() < 1e-6


def test_scores_of_images_and_pixels():
    features = torch.zeros(2, 3, 4, 6)
    features[..., 0] = 1.0
    features[1, 2, 3] = torch.tensor([0.0, 1, 0, 0, 0, 0])
    images, maps = anomaly_scores(lambda x: x[..., 1], features, (12, 16))
    assert images.tolist() == [0.0, 1.0]
    assert maps.shape == (2, 12, 16)
    assert maps[1].amax() == maps[1, -1, -1] == 1.0
    assert (maps[1, :4, :8] == 0).all()


def test_feature_vectors_end_to_end():
    """The autoencoder learns normal vectors; iterations with a separate energy run, and anomalies score higher."""
    energy = AutoencoderEnergy(6, latent=3, hidden=32)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3)
    for step in range(150):
        optimizer.zero_grad()
        energy.reconstruction_error(unit_vectors(64, step, spread=0.15)).mean().backward()
        optimizer.step()
    reference = copy.deepcopy(energy)
    policy = GaussianPolicy(SphereMean(6, 5, hidden=32), [0.1] * 5, num_fixed=0)
    value = VectorValue(6, 5, hidden=32)
    networks = DxMINetworks(policy, value, energy)
    modules = {"policy": policy, "value": value, "energy": energy}
    optimizers = {name: torch.optim.Adam(module.parameters(), lr=1e-4) for name, module in modules.items()}
    s2, slots = torch.full((5,), 0.01), torch.arange(64)
    for step in range(20):
        data = unit_vectors(64, 200 + step, spread=0.15)
        draws = draw(FEATURES, (6,), seed=0, step=step, slots=slots)
        start = latent_starts(reference, data, seed=0, step=step, slots=slots)
        trajectory = rollout(policy, start, draws.rollout)
        s2 = adapt_velocity(s2, trajectory.moves, FEATURES.avr_decay)
        for update in FEATURES.updates():
            with frozen(*(module for name, module in modules.items() if name != update.network)):
                loss, _ = update_loss(update, FEATURES, networks, data=data, trajectory=trajectory, s2=s2, draws=draws)
            optimizers[update.network].zero_grad()
            loss.backward()
            optimizers[update.network].step()
    assert any(not torch.equal(a, b) for a, b in zip(energy.parameters(), reference.parameters(), strict=True))
    normal, odd = unit_vectors(500, 400, spread=0.15), unit_vectors(500, 401, spread=3.0)
    with torch.no_grad():
        assert auroc(energy(normal), energy(odd)) > 0.8
