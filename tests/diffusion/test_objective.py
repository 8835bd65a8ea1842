import dataclasses

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import (
    BlockMask,
    CropMask,
    MaskedObjective,
    NoMask,
    PatchMask,
    cosine_schedule,
    linear_schedule,
    patchify,
)
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.random import Stream

CONFIG = UViTConfig(image_size=12, patch_size=3, dim=24, depth=3, num_heads=3, num_classes=4)
OBJECTIVE = MaskedObjective(linear_schedule(), PatchMask(0.6), 3)


class Recorder:
    """A network that keeps what it was called with and answers with a fixed function of its input."""

    def __call__(self, tokens, t, ids_keep, labels):
        self.tokens, self.t, self.ids_keep, self.labels = tokens, t, ids_keep, labels
        return 0.5 * tokens


def make_images(num=6, height=12, width=12, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, height, width, channels), dtype=torch.uint8, generator=generator)


def run(objective, model, images, labels=None, *, seed=11, step=5, first=0):
    slots = torch.arange(first, first + images.shape[0])
    return objective(model, images, labels, seed=seed, step=step, slots=slots)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("mask", [NoMask(), PatchMask(0.6), BlockMask(0.5, 2), CropMask(3)], ids=str)
def test_equals_noising_the_whole_image_and_dropping(mask, prediction):
    """The objective as published: noise on every pixel, every patch cut out, then the masked ones dropped."""
    schedule = cosine_schedule()
    images, slots = make_images(height=12, width=18), torch.arange(6)
    model = Recorder()
    out = run(MaskedObjective(schedule, mask, 3, prediction, hflip=0.5), model, images)

    draw = {"seed": 11, "step": 5, "slots": slots}
    flip = random.uniform(1, stream=Stream.FLIP, **draw)[:, 0] < 0.5
    assert flip.any() and not flip.all()
    x0 = images.permute(0, 3, 1, 2) / 127.5 - 1
    x0 = patchify(torch.where(flip[:, None, None, None], x0.flip(3), x0), 3)
    eps = random.normal(24 * 27, stream=Stream.NOISE, **draw).view(6, 24, 27)
    alpha, sigma = (scale[:, None, None] for scale in schedule.alpha_sigma(out["t"]))
    xt = alpha * x0 + sigma * eps
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]
    ids_keep = mask.sample((4, 6), **draw)
    if ids_keep is not None:
        rows = ids_keep[:, :, None].expand(-1, -1, 27)
        xt, target = xt.gather(1, rows), target.gather(1, rows)
        assert torch.equal(model.ids_keep, ids_keep)
    else:
        assert model.ids_keep is None
    loss_per_image = (0.5 * xt - target).square().mean(dim=(1, 2))

    torch.testing.assert_close(model.tokens, xt, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss_per_image"], loss_per_image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["loss"], loss_per_image.mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.t, out["t"])


def test_nothing_masked_is_read():
    """Pixels of masked patches may be NaN."""
    objective = dataclasses.replace(OBJECTIVE, layout="bchw")
    ids_keep = OBJECTIVE.mask.sample((4, 4), seed=11, step=5, slots=torch.arange(3))
    visible = torch.zeros(3, 16, dtype=torch.bool).scatter(1, ids_keep, True).view(3, 1, 4, 4)
    images = torch.rand(3, 3, 12, 12) * 2 - 1
    images = images.where(visible.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3), float("nan"))
    model = UViT(dataclasses.replace(CONFIG, num_classes=0))
    out = run(objective, model, images)
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_micro_batches_give_the_same_losses():
    model, images, labels = UViT(CONFIG), make_images(8), torch.arange(8) % 4
    objective = dataclasses.replace(OBJECTIVE, hflip=0.5, label_drop=0.5)
    whole = run(objective, model, images, labels)
    halves = [run(objective, model, images[i : i + 4], labels[i : i + 4], first=i) for i in (0, 4)]
    assert torch.equal(whole["t"], torch.cat([half["t"] for half in halves]))
    joined = torch.cat([half["loss_per_image"] for half in halves])
    torch.testing.assert_close(whole["loss_per_image"], joined, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole["loss"], joined.mean(), rtol=1e-5, atol=1e-6)


def test_step_may_be_a_tensor_and_layouts_agree():
    model, images = UViT(dataclasses.replace(CONFIG, num_classes=0)), make_images()
    expected = run(OBJECTIVE, model, images)["loss"]
    assert torch.equal(run(OBJECTIVE, model, images, step=torch.tensor(5))["loss"], expected)
    other = dataclasses.replace(OBJECTIVE, layout="bchw")
    assert torch.equal(run(other, model, images.permute(0, 3, 1, 2))["loss"], expected)
    assert not torch.equal(run(OBJECTIVE, model, images, step=6)["loss"], expected)


def test_loss_is_float32_under_autocast():
    model = UViT(dataclasses.replace(CONFIG, num_classes=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(OBJECTIVE, model, make_images())
    assert out["loss"].dtype == out["loss_per_image"].dtype == torch.float32
    assert not out["loss_per_image"].requires_grad and out["loss"].requires_grad
    torch.testing.assert_close(out["loss"], run(OBJECTIVE, model, make_images())["loss"], rtol=0.02, atol=0.0)


def test_times_are_uniform():
    schedule = cosine_schedule(10)
    t = run(MaskedObjective(schedule, CropMask(1), 3), Recorder(), make_images(1).expand(20_000, -1, -1, -1))["t"]
    counts = torch.bincount(t, minlength=10)
    assert counts.shape == (10,)
    assert (counts / 20_000 - 0.1).abs().max() < 5 * (0.1 * 0.9 / 20_000) ** 0.5


@pytest.mark.parametrize("num_timesteps", [1, 3, 1000, 1023])
def test_times_stay_in_range_at_the_extreme_draws(monkeypatch, num_timesteps):
    uniform, extremes = random.uniform, torch.tensor([[2.0**-24], [1 - 2.0**-24]])

    def patched(num, *, stream, **draw):
        return extremes if stream == Stream.TIMESTEP else uniform(num, stream=stream, **draw)

    monkeypatch.setattr(random, "uniform", patched)
    objective = MaskedObjective(cosine_schedule(num_timesteps), NoMask(), 3)
    assert run(objective, Recorder(), make_images(2))["t"].tolist() == [0, num_timesteps - 1]


def test_labels_are_dropped_with_their_probability():
    model, labels = Recorder(), torch.full((10_000,), 3)
    images = make_images(1, 3, 3).expand(10_000, -1, -1, -1)
    for probability in (0.0, 0.1, 1.0):
        run(MaskedObjective(linear_schedule(), NoMask(), 3, label_drop=probability), model, images, labels)
        assert set(model.labels.tolist()) <= {-1, 3}
        share = (model.labels == -1).float().mean().item()
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / 10_000) ** 0.5
    assert (labels == 3).all()
    run(OBJECTIVE, model, make_images())
    assert model.labels is None


def test_global_generator_plays_no_part():
    model, images = UViT(CONFIG), make_images()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(OBJECTIVE, model, images)["loss"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(run(OBJECTIVE, model, images)["loss"], first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "noise"}, "unknown prediction 'noise'"),
        ({"patch_size": 0}, "patch_size is 0, want at least 1"),
        ({"hflip": 1.5}, r"hflip is 1.5, want a probability in \[0, 1\]"),
        ({"label_drop": -0.5}, "label_drop is -0.5"),
        ({"layout": "hwc"}, "layout is 'hwc', want 'bhwc' or 'bchw'"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OBJECTIVE, **changes)


def test_call_errors():
    with pytest.raises(ValueError, match="images of 12x13 pixels do not divide into patches of 3"):
        run(OBJECTIVE, Recorder(), make_images(height=12, width=13))
    with pytest.raises(ValueError, match=r"images has shape \[6, 12, 12\], want 4 axes"):
        run(OBJECTIVE, Recorder(), make_images()[..., 0])
    # Visible patches of smaller images have places that the network knows, of other parts of an image.
    with pytest.raises(ValueError, match="images have a grid of 3x3 patches, the network's have 4x4; resize"):
        run(OBJECTIVE, UViT(CONFIG), make_images(height=9, width=9))
    with pytest.raises(ValueError, match="does not fit into the grid of 4x4"):
        run(dataclasses.replace(OBJECTIVE, mask=CropMask(5)), Recorder(), make_images())
