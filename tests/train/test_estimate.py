"""The estimates of --dry-run against what PyTorch counts."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from maskdm_fast import ops
from maskdm_fast.diffusion import MaskedObjective, make_schedule
from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import BlockMask, NoMask, PatchMask
from maskdm_fast.models import CONFIGS, UViT, UViTConfig
from maskdm_fast.train import PRESETS
from maskdm_fast.train.config import DenoisingConfig, MachineConfig, RunConfig
from maskdm_fast.train.estimate import Rates, describe, estimate, image_cost, measure_rates, visible_counts

TINY = UViTConfig(image_size=16, patch_size=2, dim=32, depth=5, num_heads=2, num_classes=3)
RATES = Rates(flops=1e12, bytes=1e11)
BATCH = 3


def loss_of(model: UViT, mask) -> torch.Tensor:
    size = model.config.image_size
    images = torch.zeros(BATCH, size, size, model.config.channels, dtype=torch.uint8)
    objective = MaskedObjective(make_schedule("cosine"), mask, model.config.patch_size)
    labels = torch.zeros(BATCH, dtype=torch.int64) if model.config.num_classes else None
    return objective(model, images, labels, seed=0, step=0, slots=torch.arange(BATCH))["loss"]


def plain_attention(qkv, cu_seqlens=None):
    """The arithmetic of the op in ops that FlopCounterMode knows."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (scores @ v).transpose(1, 2)


def counted_flops(config: UViTConfig, mask) -> int:
    model = UViT(config)
    # The counter knows PyTorch's own products, not those of oneDNN.
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        loss_of(model, mask).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mask", [NoMask(), PatchMask(0.5), BlockMask(0.9, 2)])
@pytest.mark.parametrize("changes", [{}, {"num_classes": 0, "mlp_ratio": 2.0}, {"time_mlp": True}])
def test_flops_are_those_that_pytorch_counts(monkeypatch, mask, changes):
    monkeypatch.setattr(ops, "masked_attention", plain_attention)
    config = replace(TINY, **changes)
    assert counted_flops(config, mask) == BATCH * image_cost(config, mask.num_visible((8, 8))).flops


def test_flops_of_a_final_convolution(monkeypatch):
    monkeypatch.setattr(ops, "masked_attention", plain_attention)
    config = replace(TINY, final_conv=True)
    assert counted_flops(config, NoMask()) == BATCH * image_cost(config, 64).flops


def saved_bytes(model: UViT, mask, dtype=None) -> int:
    """Bytes that the forward keeps, each piece of memory once, without what lives anyway."""
    kept = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding it keeps its address its own
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss_of(model, mask)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("mask", [NoMask(), BlockMask(0.75, 2)])
@pytest.mark.parametrize("dim", [64, 192])
def test_activations_are_those_that_autograd_keeps(dim, mask):
    """Within 5 %: small tensors are not counted."""
    config = replace(CONFIGS["emoji32"], dim=dim, num_heads=2)
    cost = image_cost(config, mask.num_visible((8, 8)))
    assert saved_bytes(UViT(config), mask) == pytest.approx(BATCH * cost.saved, rel=0.05)


def test_activations_under_autocast():
    """Within 10 % of activations and weights, which autocast keeps in both precisions."""
    config = replace(TINY, dim=64)
    model = UViT(config)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    cost = image_cost(config, 64, item=2)
    assert saved_bytes(model, NoMask(), torch.bfloat16) == pytest.approx(BATCH * cost.saved + 2 * weights, rel=0.1)


def test_checkpointing_keeps_less_and_computes_more():
    plain, saving = (image_cost(CONFIGS["small64"], 256, checkpointing=flag) for flag in (False, True))
    assert saving.saved < plain.saved / 5
    assert saving.forward == pytest.approx(plain.forward, rel=0.01)
    assert saving.flops == pytest.approx(4 / 3 * plain.flops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "count", "gmacs"),
    [("small64", 256, 12.21), ("small128", 1024, 59.2), ("small256", 4096, 404), ("base256", 4096, 741)],
)
def test_forward_of_the_published_sizes(name, count, gmacs):
    """Against an independent count of the multiply-adds of MaskDM's networks."""
    assert image_cost(CONFIGS[name], count).forward / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_visible_counts_follow_the_mask():
    grid = (8, 8)
    half = DenoisingConfig(mask=PatchMask(0.5), num_images=1000, batch_size=10)
    assert visible_counts(half, grid) == [(32, pytest.approx(1.0))]
    assert visible_counts(replace(half, unmasked_share=0.25), grid) == [(32, pytest.approx(0.75)), (64, 0.25)]
    steps = replace(half, mask_schedule=MaskSchedule("steps", ((0.0, 250),)))
    assert visible_counts(steps, grid) == [(32, pytest.approx(0.25)), (64, pytest.approx(0.75))]
    ramp = visible_counts(replace(half, mask_schedule=MaskSchedule("linear", ((0.0, 1000),))), grid)
    assert sum(count * share for count, share in ramp) == pytest.approx(48, abs=0.5)
    spread = visible_counts(replace(half, mask=PatchMask(0.25, 0.75)), grid)
    assert sum(count * share for count, share in spread) == pytest.approx(32, abs=1)
    assert sum(share for _, share in spread) == pytest.approx(1.0)


def test_memory_and_time_add_up():
    config = PRESETS["small64-pretrain"]()
    found = estimate(config, RATES)
    assert found.parameters == 44_292_144
    assert (found.visible, found.patches, found.extras) == (32, 256, 1)
    assert found.memory["optimizer and average"] == 12 * found.parameters
    assert found.memory["activations"] == 256 * found.masked.saved
    assert found.steps == 200_000 and found.seconds == pytest.approx(200_000 * found.step_seconds)
    assert found.step_seconds > 256 * found.masked.flops / RATES.flops
    small = replace(config, machine=MachineConfig(micro_batch_size=32))
    assert estimate(small, RATES).memory["activations"] == 32 * found.masked.saved
    short = replace(config, stage=replace(config.stage, max_seconds=60.0))
    assert estimate(short, RATES).seconds == 60.0 and estimate(short, RATES).limited
    endless = replace(config, stage=replace(config.stage, max_seconds=60.0, num_images=None))
    assert estimate(endless, RATES).steps is None and estimate(endless, RATES).seconds == 60.0


def test_rates_are_measured():
    rates = measure_rates(TINY, 100, torch.float32, torch.device("cpu"))
    assert 1e8 < rates.flops < 1e13 and 1e8 < rates.bytes < 1e13


def test_description_names_every_value_and_every_stage(monkeypatch):
    monkeypatch.setattr("maskdm_fast.train.estimate.measure_rates", lambda *a: RATES)
    text = describe(PRESETS["celebahq-base"]())
    for word in ("1-pretrain90", "2-pretrain50", "3-finetune", "102,417,456", "416 of 4096", "machine.device", "lr"):
        assert word in text
    assert text.count("masking gain") == 2  # none where nothing is masked
    assert "and 192 more for each class of the data set" in describe(PRESETS["emoji32-classes"]())
    assert "run" in describe(RunConfig())
