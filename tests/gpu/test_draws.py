"""All backends draw the same numbers, on every device."""

import pytest
import torch

from maskdm_fast import ops, random
from maskdm_fast.diffusion import BlockMask, PatchMask
from maskdm_fast.ops import backend
from maskdm_fast.random import Stream

SLOTS = (0, 1, 5, 2**40)
STEP = 2**33 + 7


def test_words_and_masks(device):
    """32-bit words, and masks made of them: equal."""
    results = []
    for place in ("cpu", device):
        draw = {"seed": 2**50 + 3, "step": torch.tensor(STEP, device=place), "slots": torch.tensor(SLOTS, device=place)}
        found = [random.bits(1001, stream=Stream.NOISE, **draw), random.uniform(1001, stream=Stream.FLIP, **draw)]
        found += [mask.sample((16, 16), **draw) for mask in (PatchMask(0.9), BlockMask(0.75, 4))]
        results.append([value.cpu() for value in found])
    for want, have in zip(*results, strict=True):
        assert torch.equal(want, have)


@pytest.mark.parametrize("name", ["reference", "cpu", "cuda", "triton"])
def test_noise(name, device):
    """Noise, of which the kernels give the normals only: as near to the exact ones as float32 arithmetic is."""
    reason = backend.why_not(name, device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    side, patch = 16, 4
    images = torch.zeros(len(SLOTS), 3, side, side, dtype=torch.uint8, device=device)
    slots = torch.tensor(SLOTS, device=device)
    step, ones = torch.tensor(STEP), torch.ones(len(SLOTS), device=device)
    _, eps = ops.noise_visible_patches(
        images, None, 0 * ones, ones, patch_size=patch, seed=11, step=step.to(device), slots=slots, backend=name
    )
    count = 3 * side * side
    exact = random.normal(count, seed=11, stream=Stream.NOISE, step=step, slots=slots.cpu(), dtype=torch.float64)
    error = (eps.cpu().double().flatten(1) - exact).abs()
    # The radius is at most 5.8; float32 gives it, the sine and the product with an error of a few units in the last
    # place each. A word that differed in one bit of its upper half would be off by a thousand times that.
    assert error.max() < 2e-6, error.max()
