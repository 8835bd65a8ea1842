import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from maskdm_fast.diffusion import patchify, unpatchify
from maskdm_fast.models import UViT, UViTConfig, changed_fields, transfer

SMALL = UViTConfig(image_size=12, patch_size=3, channels=2, dim=16, depth=3, num_heads=2, num_classes=3)


def changed(**values):
    return dataclasses.replace(SMALL, **values)


def make_model(config=SMALL):
    """float64, with every parameter away from its initial 0 or 1."""
    model = UViT(config, seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


def transferred(model, config):
    new = UViT(config).double()
    new.load_state_dict(transfer(model.state_dict(), model.config, config))
    return new


def make_images(side, batch=2):
    return torch.randn(batch, 2, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


T, LABELS = torch.tensor([3, 700]), torch.tensor([2, -1])


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_repeated_image_gives_the_repeated_prediction(factor):
    model = make_model()
    new = transferred(model, changed(image_size=12 * factor, patch_size=3 * factor))
    images = make_images(12)
    expected = unpatchify(model(patchify(images, 3), T, None, LABELS), 3, 12, 12, 2)

    def repeat(x):
        return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    out = new(patchify(repeat(images), 3 * factor), T, None, LABELS)
    torch.testing.assert_close(
        unpatchify(out, 3 * factor, 12 * factor, 12 * factor, 2), repeat(expected), rtol=1e-9, atol=1e-9
    )


def test_a_final_convolution_does_not_go_to_another_patch_size():
    """It reads 3x3 pixels, and no 3x3 kernel does on repeated pixels what it did."""
    model = make_model(changed(final_conv=True))
    with pytest.warns(RuntimeWarning, match=r"from 3 to 6, but the final convolution still reads 3x3 pixels"):
        new = transferred(model, changed(final_conv=True, image_size=24, patch_size=6))
    images = make_images(12)
    expected = unpatchify(model(patchify(images, 3), T, None, LABELS), 3, 12, 12, 2)
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    out = unpatchify(new(patchify(larger, 6), T, None, LABELS), 6, 24, 24, 2)
    assert (F.avg_pool2d(out, 2) - expected).abs().mean() > 0.1 * expected.abs().mean()


def test_a_final_convolution_goes_with_more_patches(recwarn):
    transferred(make_model(changed(final_conv=True)), changed(final_conv=True, image_size=24))
    assert not recwarn.list


def test_any_larger_image_is_embedded_as_its_average():
    model = make_model()
    new = transferred(model, changed(image_size=24, patch_size=6))
    images = make_images(24)
    embedded = new.patch_embed(patchify(images, 6))
    torch.testing.assert_close(
        embedded, model.patch_embed(patchify(F.avg_pool2d(images, 2), 3)), rtol=1e-10, atol=1e-10
    )


def test_a_linear_image_is_embedded_alike_at_every_size():
    model = make_model()

    def ramp(side):
        centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        return (0.3 + 2.0 * centres[:, None] - 0.7 * centres).expand(1, 2, -1, -1)

    expected = model.patch_embed(patchify(ramp(12), 3))
    for factor in (2, 4):
        new = transferred(model, changed(image_size=12 * factor, patch_size=3 * factor))
        torch.testing.assert_close(
            new.patch_embed(patchify(ramp(12 * factor), 3 * factor)), expected, rtol=1e-10, atol=1e-10
        )


def test_shrinking_is_the_mirror_of_enlarging():
    """A small image is embedded as its enlargement, and the average of the large prediction is predicted."""
    model = make_model(changed(image_size=24, patch_size=6))
    new = transferred(model, SMALL)
    images = make_images(12)
    enlarged = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = unpatchify(model(patchify(enlarged, 6), T, None, LABELS), 6, 24, 24, 2)
    out = unpatchify(new(patchify(images, 3), T, None, LABELS), 3, 12, 12, 2)
    torch.testing.assert_close(out, F.avg_pool2d(expected, 2), rtol=1e-9, atol=1e-9)


def test_enlarging_by_a_fraction_goes_by_areas():
    model = make_model()
    new = transferred(model, changed(image_size=20, patch_size=5))
    images = make_images(12)

    def resize(x):  # 3 -> 15 -> 5 pixels a patch
        return F.avg_pool2d(x.repeat_interleave(5, 2).repeat_interleave(5, 3), 3)

    expected = resize(unpatchify(model(patchify(images, 3), T, None, LABELS), 3, 12, 12, 2))
    out = unpatchify(new(patchify(resize(images), 5), T, None, LABELS), 5, 20, 20, 2)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_there_and_back_is_where_it_began():
    weights = make_model().state_dict()
    larger = changed(image_size=24, patch_size=6)
    back = transfer(transfer(weights, SMALL, larger), larger, SMALL)
    for name, tensor in weights.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", [8, 16, 2])
def test_positions_are_sampled_from_the_same_surface(side):
    def surface(side):
        centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        rows = torch.stack([torch.cos(math.pi * k * centres) for k in range(2)])
        return torch.einsum("ay,bx->yxab", rows, rows).flatten(0, 1).flatten(1)  # [N, 4]

    config = UViTConfig(image_size=12, patch_size=3, channels=2, dim=4, depth=1, num_heads=1, num_classes=3)
    weights = UViT(config).double().state_dict()
    weights["positions"][2:] = surface(4)
    table = transfer(weights, config, dataclasses.replace(config, image_size=3 * side))["positions"]
    assert torch.equal(table[:2], weights["positions"][:2])
    assert table.shape == (2 + side**2, 4)
    # Four samples of half a cosine are coarse; a transposed or shifted table would be off by 0.5 and more.
    torch.testing.assert_close(table[2:], surface(side), rtol=0.0, atol=0.2)
    torch.testing.assert_close(table[2:, 0], torch.ones(side**2, dtype=torch.float64))


def test_every_row_counts_when_the_grid_shrinks():
    """Bicubic interpolation reads 4 rows per axis, which would pass over most of 12 on the way to 2."""
    config = UViTConfig(image_size=24, patch_size=2, dim=4, depth=1, num_heads=1)
    weights = UViT(config).double().state_dict()
    table = weights["positions"].requires_grad_()
    small = transfer(weights, config, dataclasses.replace(config, image_size=4))["positions"]
    small.square().sum().backward()
    assert (table.grad[1:].abs().sum(1) > 0).all()


def test_what_does_not_change_is_handed_through():
    weights = make_model().state_dict()
    out = transfer(weights, SMALL, changed(image_size=24))
    assert {name for name in out if out[name] is not weights[name]} == {"positions"}
    out = transfer(weights, SMALL, changed(image_size=24, patch_size=6))
    assert {name for name in out if out[name] is not weights[name]} == {
        "patch_embed.weight",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in make_model().state_dict().items()}
    out = transfer(weights, SMALL, changed(image_size=36, patch_size=6, final_conv=True))
    assert {tensor.dtype for tensor in out.values()} == {dtype}


def test_a_final_convolution_is_added_as_the_identity():
    model = make_model()
    tokens = patchify(make_images(12), 3)
    new = transferred(model, changed(final_conv=True))
    assert torch.equal(new(tokens, T, None, LABELS), model(tokens, T, None, LABELS))


def test_what_cannot_be_transferred_is_named():
    weights = make_model().state_dict()
    with pytest.raises(ValueError, match=r"differ in num_heads 2 -> 4; only final_conv, image_size, patch_size"):
        transfer(weights, SMALL, changed(num_heads=4, image_size=24))
    with pytest.raises(ValueError, match="set final_conv=True"):
        transfer(weights, changed(final_conv=True), SMALL)


def test_depths_of_one_network_are_no_change():
    assert changed_fields(changed(depth=2), changed(depth=3)) == {}
    assert changed_fields(SMALL, changed(depth=5, image_size=24)) == {"depth": (3, 5), "image_size": (12, 24)}
