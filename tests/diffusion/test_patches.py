import pytest
import torch

from maskdm_fast.diffusion import patchify, unpatchify


def test_order_of_a_patch_vector():
    channels, height, width, patch = 3, 4, 6, 2
    images = torch.arange(2 * channels * height * width).view(2, channels, height, width)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, 6, 12)
    for n in range(6):
        for py in range(patch):
            for px in range(patch):
                for c in range(channels):
                    row, column = n // 3 * patch + py, n % 3 * patch + px
                    assert torch.equal(tokens[:, n, (py * patch + px) * channels + c], images[:, c, row, column])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 4, 12), (0, 3, 4, 4)])
def test_round_trip(shape):
    images = torch.randn(shape)
    assert torch.equal(unpatchify(patchify(images, 4), 4, *shape[2:], shape[1]), images)
    images = torch.randn(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    assert torch.equal(unpatchify(patchify(images, 2), 2, *shape[2:], shape[1]), images)


def test_errors():
    with pytest.raises(ValueError, match=r"images has shape \[1, 3, 8, 9\], want .* multiples of 4"):
        patchify(torch.zeros(1, 3, 8, 9), 4)
    with pytest.raises(ValueError, match=r"images has shape \[3, 8, 8\]"):
        patchify(torch.zeros(3, 8, 8), 4)
    with pytest.raises(ValueError, match=r"tokens has shape \[1, 4, 47\], want \[B, 4, 48\] for 3 channels of 8x8"):
        unpatchify(torch.zeros(1, 4, 47), 4, 8, 8, 3)
    for call in (lambda: patchify(torch.zeros(1, 3, 8, 8), 0), lambda: unpatchify(torch.zeros(1, 4, 48), 0, 8, 8, 3)):
        with pytest.raises(ValueError, match="patchify: patch_size is 0, want at least 1"):
            call()
    with pytest.raises(ValueError, match="multiples of 4"):
        unpatchify(torch.zeros(1, 4, 48), 4, 9, 8, 3)
