"""The estimates of --dry-run against what PyTorch counts."""

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
from maskdm_fast.train.costs import model_flops, network_parts, saved_bytes, total, visible_counts
from maskdm_fast.train.estimate import describe, estimate
from maskdm_fast.train.hardware import HARDWARE, Hardware

TINY = UViTConfig(image_size=16, patch_size=2, dim=32, depth=5, num_heads=2, num_classes=3)
PLAIN = Hardware(
    "plain", {"fp32": 1e12, "bf16": 1e12}, bandwidth=1e11, launch=0.0, product_share=1.0, bandwidth_share=1.0
)
BATCH = 3


def loss_of(model: UViT, mask) -> torch.Tensor:
    size = model.config.image_size
    images = torch.zeros(BATCH, size, size, model.config.channels, dtype=torch.uint8)
    objective = MaskedObjective(make_schedule("cosine"), mask, model.config.patch_size)
    labels = torch.zeros(BATCH, dtype=torch.int64) if model.config.num_classes else None
    return objective(model, images, labels, seed=0, step=0, slots=torch.arange(BATCH))["loss"]


def counted_flops(config: UViTConfig, mask, *, checkpointing: bool = False) -> int:
    model = UViT(config)
    model.activation_checkpointing = checkpointing
    ops.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        loss_of(model, mask).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mask", [NoMask(), PatchMask(0.5), BlockMask(0.9, 2)])
@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 0, "mlp_ratio": 2.0}, {"time_mlp": True}, {"qkv_bias": True, "depth": 2}]
)
def test_flops_are_those_that_pytorch_counts(mask, changes):
    config = replace(TINY, **changes)
    parts = network_parts(config, [(mask.num_visible((8, 8)), 1.0)], BATCH)
    assert counted_flops(config, mask) == total(parts).flops


def test_flops_of_blocks_that_are_computed_twice():
    parts = network_parts(TINY, [(32, 1.0)], BATCH, checkpointing=True)
    assert counted_flops(TINY, PatchMask(0.5), checkpointing=True) == total(parts).flops
    assert total(parts).model_flops == BATCH * model_flops(TINY, [(32, 1.0)])


def test_flops_of_a_final_convolution():
    config = replace(TINY, final_conv=True)
    assert counted_flops(config, NoMask()) == total(network_parts(config, [(64, 1.0)], BATCH)).flops


def test_model_flops_count_nothing_twice():
    """Six operations a weight and token, and twelve n^2 D of attention in a block."""
    config, n = CONFIGS["small64"], 257
    weights = 13 * 12 * 512**2 + 6 * 2 * 512**2 + 48 * 512
    assert model_flops(config, [(256, 1.0)]) == 6 * weights * n + 4 * 48 * 512 * 256 + 13 * 12 * n * n * 512


def kept_bytes(model: UViT, mask, dtype=None) -> int:
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
    saved = saved_bytes(config, mask.num_visible((8, 8)))
    assert kept_bytes(UViT(config), mask) == pytest.approx(BATCH * saved, rel=0.05)


def test_activations_under_autocast():
    """Within 10 % of activations and weights, which autocast keeps in both precisions."""
    config = replace(TINY, dim=64)
    model = UViT(config)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    saved = saved_bytes(config, 64, item=2)
    assert kept_bytes(model, NoMask(), torch.bfloat16) == pytest.approx(BATCH * saved + 2 * weights, rel=0.1)


def test_checkpointing_keeps_less_and_computes_more():
    config = CONFIGS["small64"]
    assert saved_bytes(config, 256, checkpointing=True) < saved_bytes(config, 256) / 5
    plain, twice = (total(network_parts(config, [(256, 1.0)], checkpointing=flag)) for flag in (False, True))
    assert twice.flops == pytest.approx(4 / 3 * plain.flops, rel=0.02)
    assert twice.model_flops == plain.model_flops


@pytest.mark.parametrize(
    ("name", "count", "gmacs"),
    [("small64", 256, 12.21), ("small128", 1024, 59.2), ("small256", 4096, 404), ("base256", 4096, 741)],
)
def test_forward_of_the_published_sizes(name, count, gmacs):
    """Against an independent count of the multiply-adds of MaskDM's networks."""
    forward = sum(part.forward.flops * part.calls for part in network_parts(CONFIGS[name], [(count, 1.0)]))
    assert forward / 2e9 == pytest.approx(gmacs, rel=0.01)


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
    found = estimate(config)
    assert found.parameters == 44_292_144
    assert (found.visible, found.patches, found.extras) == (32, 256, 1)
    assert found.memory.of("moments") + found.memory.of("average") == 12 * found.parameters
    assert found.memory.of("activations") == 256 * saved_bytes(config.model, 32, item=2)
    step = found.on(PLAIN).step.seconds
    assert found.steps == 200_000 and found.seconds(step) == (pytest.approx(200_000 * step), False)
    assert step > found.work.flops / 1e12
    small = estimate(replace(config, machine=MachineConfig(micro_batch_size=32)))
    assert small.memory.of("activations") == 32 * saved_bytes(config.model, 32, item=2)
    assert small.work.flops == pytest.approx(found.work.flops)
    # Eight times: weights read, cast and their gradients written; and seven times: the gradients added up.
    assert small.work.bytes > found.work.bytes + 7 * 12 * found.parameters
    assert replace(found, max_seconds=60.0).seconds(step) == (60.0, True)
    assert replace(found, max_seconds=60.0, steps=None).seconds(step) == (60.0, True)


def test_weights_and_gradients_pass_as_often_as_a_step_uses_them():
    """One image of one patch: 2 reads and 1 write of every matrix in float32, and 40 bytes a value of the update."""
    config = replace(PRESETS["smoke-pretrain"](), model=replace(CONFIGS["small64"], image_size=4))
    config = replace(config, stage=replace(config.stage, batch_size=1, mask=NoMask()))
    found = estimate(config)
    assert found.work.bytes == pytest.approx((12 + 40) * found.parameters, rel=0.02)


def test_description_names_every_value_and_every_stage(monkeypatch):
    monkeypatch.setattr("maskdm_fast.train.estimate.probe", lambda *a: PLAIN)
    text = describe(PRESETS["celebahq-base"]())
    for word in ("1-pretrain90", "2-pretrain50", "3-finetune", "102,417,456", "416 of 4096", "machine.device", "lr"):
        assert word in text
    assert text.count("masking gain") == 2  # none where nothing is masked
    assert "and 192 more for each class of the data set" in describe(PRESETS["emoji32-classes"]())
    text = describe(RunConfig(), ("h100", "here"))
    assert "run" in text and "% MFU" in text and HARDWARE["h100"].title in text
