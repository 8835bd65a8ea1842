"""noise_visible_patches on the emulated CUDA kernel: the draws one by one, the exact pixels, and ids out of range."""

import itertools
import math

import pytest
import torch

from maskdm_fast import ops, random

SLOTS = torch.tensor([0, 3, 2**32 - 1, 2**32 + 3])


def _noise(images, ids_keep=None, sigma=1.0, **options):
    """alpha is 1 - sigma: noise alone by default, pixels alone for sigma = 0."""
    sigma = torch.full((images.shape[0],), sigma)
    settings = {"patch_size": 4, "layout": "bhwc", "seed": 2**40 + 1, "step": 5, "slots": SLOTS[: images.shape[0]]}
    return ops.noise_visible_patches(images, ids_keep, 1 - sigma, sigma, **(settings | options), backend="cpu")


@pytest.mark.parametrize("step", [0, 2**31 + 5, 2**40 + 7], ids=["step_0", "step_2_31", "step_2_40"])
@pytest.mark.parametrize(("patch_size", "channels"), [(4, 3), (3, 1), (1, 3), (3, 3)])
def test_normals_are_those_of_the_words(emulated, patch_size, channels, step):
    """Every value is within 4 units in the last place of Box-Muller in float64 on the words of `random.bits`.

    As the next test shows, uniforms whose last bit were wrong would not be: the words agree as far as they are used.
    """
    images = torch.zeros((4, 8 * patch_size, 12 * patch_size, channels), dtype=torch.uint8)
    step = torch.tensor(step)  # whose low 32 bits count; an int above is refused
    count = 96 * patch_size**2 * channels
    wanted = random.normal(
        count, seed=2**63 - 1, stream=random.Stream.NOISE, step=step, slots=SLOTS, dtype=torch.float64
    )
    noise, target = _noise(images, patch_size=patch_size, seed=2**63 - 1, step=step)
    ulp = torch.finfo(torch.float32).eps * 2.0 ** wanted.abs().log2().floor()
    assert ((noise.flatten(1).double() - wanted).abs() <= 4 * ulp).all()
    assert torch.equal(noise, target)


def test_the_bound_on_normals_shows_a_single_bit():
    """What the test above would say of draws whose uniforms are off by their last bit, for either word of a pair."""
    u = random.uniform(4000, seed=1, stream=random.Stream.NOISE, step=0, slots=SLOTS[:1]).double().view(-1, 2)

    def normals(radius, angle):
        angle = 2 * math.pi * angle
        return ((-2 * radius.log()).sqrt() * torch.stack([angle.cos(), angle.sin()])).flatten()

    wanted = normals(*u.T)
    ulp = torch.finfo(torch.float32).eps * 2.0 ** wanted.abs().log2().floor()
    for off in ((2.0**-23, 0.0), (0.0, 2.0**-23)):
        shown = (normals(*(u - torch.tensor(off)).T) - wanted).abs() > 4 * ulp
        assert shown.double().mean() > 0.15


def test_only_the_words_of_the_place_count(emulated):
    """A patch has the same noise whatever else is visible, in whatever order, also where it begins inside a block."""
    images = torch.zeros((4, 9, 12, 1), dtype=torch.uint8)
    whole, _ = _noise(images, patch_size=3)
    ids_keep = torch.tensor([[11, 0, 5], [1, 2, 3], [10, 9, 0], [7, 7, 7]])
    noise, _ = _noise(images, ids_keep, patch_size=3)
    assert torch.equal(noise, whole.gather(1, ids_keep[:, :, None].expand(-1, -1, 9)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_exact_however_they_are_loaded(emulated, channels, dtype):
    """x0 is bit-equal to `u / 127.5 - 1` for all 256 values, or to the pixel, loaded at once or one by one."""
    values = torch.arange(2 * 16 * 20 * channels).view(2, 16, 20, channels)
    pixels = (values * 37 % 256).to(torch.uint8)
    assert pixels.unique().numel() == 256
    pixels = pixels if dtype == torch.uint8 else (pixels.float() / 127.5 - 1).to(dtype)
    x0 = pixels.float() / 127.5 - 1 if dtype == torch.uint8 else pixels.float()
    layouts = [
        torch.empty_like(pixels),
        torch.empty(pixels.numel() + 1, dtype=dtype)[1:].view(pixels.shape),  # off the boundary of four values
        torch.empty((2, 16, 20, channels + 1), dtype=dtype)[..., :channels],  # pixels apart
        torch.empty((2, 16, 21, channels), dtype=dtype)[:, :, :20],  # rows apart
        torch.empty((2, channels, 16, 20), dtype=dtype).permute(0, 2, 3, 1),
    ]
    for (number, layout), flip in itertools.product(enumerate(layouts), (False, True)):
        layout.copy_(pixels)
        seen = torch.where(torch.tensor([False, flip])[:, None, None, None], x0.flip(2), x0)
        wanted = seen.unflatten(1, (4, 4)).unflatten(3, (5, 4)).transpose(2, 3).reshape(2, 20, -1)
        xt, _ = _noise(layout, sigma=0.0, flip=torch.tensor([False, flip]))
        assert torch.equal(xt, wanted), f"layout {number}, flip {flip}"


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ids_out_of_range_read_nothing_and_show(emulated, prediction, packed):
    images = torch.full((2, 16, 16, 3), 7, dtype=torch.uint8)
    good, bad = torch.tensor([[3, 4, 5], [15, 0, 1]]), torch.tensor([[3, -1, 16], [2**40, 0, -(2**62)]])
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32) if packed else None
    results = []
    for ids_keep in (good, bad):
        shaped = ids_keep.flatten() if packed else ids_keep
        results.append(_noise(images, shaped, sigma=0.5, prediction=prediction, cu_seqlens=cu_seqlens))
    exists = (good == bad).view(shaped.shape)
    for wanted, out in zip(*results, strict=True):
        assert torch.equal(out[exists], wanted[exists])
        assert out[~exists].isnan().all()


def test_float64_is_refused(emulated):
    images = torch.zeros((2, 8, 8, 3), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64 images have no CUDA kernel, want uint8"):
        _noise(images)
    with pytest.raises(RuntimeError, match="out_dtype float64 has no CUDA kernel, want float32"):
        _noise(images.to(torch.uint8), out_dtype=torch.float64)
