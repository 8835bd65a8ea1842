import dataclasses

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import BlockMask, CropMask, MaskedObjective, NoMask, PatchMask, linear_schedule
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.random import Stream

CONFIG = UViTConfig(image_size=12, patch_size=3, dim=24, depth=3, num_heads=3, num_classes=4)
GRID, TOTAL = (4, 4), 16
RANGE = MaskedObjective(linear_schedule(), PatchMask(0.3, 0.9), 3, hflip=0.5, label_drop=0.5)
MIXED = dataclasses.replace(RANGE, mask=BlockMask(0.5, 2), unmasked_share=0.5)


def make_batch(num=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, 12, 12, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(num) % 4


def run(objective, model, images, labels, *, first=0, **changes):
    slots = torch.arange(first, first + images.shape[0])
    return objective(model, images, labels, **({"seed": 11, "step": 5, "slots": slots} | changes))


def gradients(model, loss):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


def draw_packed(objective, num=8):
    draw = {"seed": 11, "step": 5, "slots": torch.arange(num)}
    whole = None
    if objective.unmasked_share:
        whole = random.uniform(1, stream=Stream.UNMASKED, **draw)[:, 0] < objective.unmasked_share
    return objective.mask.sample_packed(GRID, **draw, whole=whole)


@pytest.mark.parametrize("objective", [RANGE, MIXED], ids=["range", "unmasked_share"])
def test_equals_dense_images_one_by_one(objective):
    """float64 weights; each image alone is dense, with the patches that the packed batch drew for it."""
    model, (images, labels) = UViT(CONFIG).double(), make_batch()
    out = run(objective, model, images, labels)
    ids_keep, cu_seqlens = draw_packed(objective)
    images_ids = ids_keep.tensor_split(cu_seqlens[1:-1].long())
    assert len({len(ids) for ids in images_ids}) > 1
    alone = [
        run(objective, model, images[i : i + 1], labels[i : i + 1], first=i, ids_keep=ids[None])
        for i, ids in enumerate(images_ids)
    ]
    torch.testing.assert_close(
        out["loss_per_image"], torch.cat([one["loss_per_image"] for one in alone]), rtol=1e-12, atol=0
    )
    loss = torch.stack([one["loss"] for one in alone]).mean()
    torch.testing.assert_close(gradients(model, out["loss"]), gradients(model, loss), rtol=1e-9, atol=1e-13)
    assert out["mask_ratio"].item() == pytest.approx(1 - len(ids_keep) / (8 * TOTAL))
    assert torch.equal(out["t"], torch.cat([one["t"] for one in alone]))


@pytest.mark.parametrize("mask", [PatchMask(0.6), BlockMask(0.5, 2), CropMask(3)], ids=str)
def test_equal_counts_equal_the_dense_form(mask):
    model, (images, labels) = UViT(CONFIG).double(), make_batch()
    objective = dataclasses.replace(RANGE, mask=mask)
    dense = run(objective, model, images, labels)
    ids_keep, cu_seqlens = draw_packed(objective)
    packed = run(objective, model, images, labels, ids_keep=ids_keep, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed["loss_per_image"], dense["loss_per_image"], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, packed["loss"]), gradients(model, dense["loss"]), rtol=1e-9, atol=1e-13)
    assert packed["mask_ratio"] == dense["mask_ratio"] == 1 - mask.num_visible(GRID) / TOTAL


@pytest.mark.parametrize("objective", [RANGE, MIXED], ids=["range", "unmasked_share"])
def test_micro_batches_give_the_same_losses(objective):
    """3 does not divide 8, so the micro-batches differ in images as well as in tokens."""
    model, (images, labels) = UViT(CONFIG).double(), make_batch()
    whole = run(objective, model, images, labels)
    parts = [run(objective, model, images[i : i + 3], labels[i : i + 3], first=i) for i in (0, 3, 6)]
    joined = torch.cat([part["loss_per_image"] for part in parts])
    torch.testing.assert_close(whole["loss_per_image"], joined, rtol=1e-12, atol=0)
    shares = sum(part["loss"] * len(part["t"]) / 8 for part in parts)
    torch.testing.assert_close(gradients(model, whole["loss"]), gradients(model, shares), rtol=1e-9, atol=1e-13)


def test_unmasked_share_leaves_the_other_images_alone():
    model, (images, labels) = UViT(CONFIG).double(), make_batch(64)
    masked = run(dataclasses.replace(MIXED, unmasked_share=0.0), model, images, labels)["loss_per_image"]
    whole = run(dataclasses.replace(MIXED, mask=NoMask()), model, images, labels)["loss_per_image"]
    mixed = run(MIXED, model, images, labels)["loss_per_image"]
    is_whole = torch.isclose(mixed, whole, rtol=1e-10)
    torch.testing.assert_close(mixed[~is_whole], masked[~is_whole], rtol=1e-12, atol=0)
    assert 64 * 0.5 - 20 < is_whole.sum() < 64 * 0.5 + 20  # five standard deviations
    assert torch.allclose(
        run(dataclasses.replace(MIXED, unmasked_share=1.0), model, images, labels)["loss_per_image"], whole
    )


def test_no_packing_where_all_images_are_whole():
    """A schedule may end unmasked: the dense form serves, whatever the share."""
    calls = []

    def model(tokens, t, ids_keep, labels):
        calls.append((tokens.shape, ids_keep))
        return tokens

    out = run(MIXED, model, *make_batch(), mask=PatchMask(0.0))
    assert calls == [((8, TOTAL, 27), None)] and out["mask_ratio"] == 0.0


def test_mask_of_a_batch_takes_the_place_of_the_objectives():
    model, batch = UViT(CONFIG), make_batch()
    expected = run(dataclasses.replace(RANGE, mask=CropMask(2)), model, *batch)
    assert torch.equal(run(RANGE, model, *batch, mask=CropMask(2))["loss"], expected["loss"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": torch.zeros(9, dtype=torch.int32)}, ValueError, "cu_seqlens is given without ids_keep"),
        ({"ids_keep": torch.zeros(8, 1, dtype=torch.int64), "mask": NoMask()}, ValueError, "both given; want one"),
        ({"ids_keep": torch.zeros(7, 1, dtype=torch.int64)}, ValueError, r"ids_keep has shape \[7, 1\], want \[8, K\]"),
        ({"ids_keep": torch.full((8, 1), TOTAL)}, RuntimeError, "want 0 <= id < 16"),
        (
            {"ids_keep": torch.arange(8), "cu_seqlens": torch.arange(9)},
            TypeError,
            "cu_seqlens has dtype int64, want int32",
        ),
        (
            {"ids_keep": torch.arange(8), "cu_seqlens": torch.arange(8, dtype=torch.int32)},
            ValueError,
            r"cu_seqlens has shape \[8\], want \[9\]",
        ),
    ],
)
def test_call_errors(changes, error, message):
    with pytest.raises(error, match=message):
        run(RANGE, UViT(CONFIG), *make_batch(), **changes)


def test_configuration_errors():
    with pytest.raises(ValueError, match=r"unmasked_share is 1.5, want a probability in \[0, 1\]"):
        dataclasses.replace(RANGE, unmasked_share=1.5)
