"""Times, launches and bounds of the estimates."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from maskdm_fast.diffusion.masking import BlockMask, CropMask, NoMask, PatchMask
from maskdm_fast.ops import backend
from maskdm_fast.ops.work import Work
from maskdm_fast.train import PRESETS, launches
from maskdm_fast.train.costs import Part
from maskdm_fast.train.estimate import estimate
from maskdm_fast.train.hardware import HARDWARE, Hardware, find_hardware, probe, stated_peak
from maskdm_fast.train.launches import count_launches
from maskdm_fast.train.roofline import launches_of_parts, roofline
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.world import World

needs_native = pytest.mark.skipif(not backend.has_native(), reason="the native library is not built")
GPU = Hardware("gpu", {"bf16": 100.0}, 10.0, launch=1.0, product_share=0.5, bandwidth_share=0.1, device_names=("g",))
PARTS = [
    Part("product", "linear", 2, Work(100.0, 0.0, 1.0), Work(200.0, 50.0, 1.0)),
    Part("copy", "gelu", 1, Work(bytes=4.0)),
    Part("others", "rest", 1, Work()),
]


def test_a_part_takes_the_longer_of_arithmetic_and_traffic():
    found = roofline(PARTS, Counter(linear=2, gelu=1), GPU, "bf16")
    assert (found.parts["product"].compute, found.parts["product"].memory) == (2 * (2.0 + 4.0), 2 * (1.0 + 1.0))
    assert found.parts["product"].seconds == 12.0 and found.parts["product"].bound == "compute"
    assert found.parts["copy"].seconds == 4.0 and found.parts["copy"].bound == "memory"
    assert found.device_seconds == found.step.seconds == 16.0 and found.step.bound == "compute"
    # 500 operations that are not repeated, in a time in which the peak does 1,600.
    assert found.mfu == pytest.approx(500 / 1600)


def test_launches_bound_a_gpu_only_where_they_take_longest():
    counts = Counter(linear=10, gelu=7, rest=3)
    found = roofline(PARTS, counts, GPU, "bf16")
    assert (found.step.seconds, found.device_seconds, found.step.bound) == (20.0, 16.0, "launches")
    assert found.parts["copy"].bound == "launches" and found.parts["copy"].seconds == 4.0
    serial = roofline(PARTS, counts, replace(GPU, asynchronous=False, device_names=()), "bf16")
    assert serial.step.seconds == 36.0 and serial.parts["copy"].seconds == 11.0 and serial.mfu is None


def test_launches_are_spread_over_the_parts():
    parts = [Part("qkv", "linear", 3, Work()), Part("head", "linear", 1, Work()), Part("others", "rest", 2, Work())]
    found = launches_of_parts(parts, Counter(linear=8, rest=4, casts=6))
    assert found == {"qkv": 6.0, "head": 2.0, "others": 10.0}


def test_data_sheets_are_consistent():
    """Half of what a sheet says with sparsity; products in fewer bits are faster; and the sheet is named."""
    for hardware in HARDWARE.values():
        assert hardware.peaks["bf16"] > hardware.peaks["tf32"] > hardware.peaks["fp32"]
        assert hardware.peaks["bf16"] / hardware.peaks["tf32"] == pytest.approx(2, rel=0.03)
        assert "data sheet" in hardware.source and hardware.is_named
        # What `ops.work.Work` says about elementwise arithmetic.
        assert 9 < hardware.peaks["fp32"] / hardware.bandwidth <= 20
    assert HARDWARE["h100"].peaks == HARDWARE["h200"].peaks


def test_a_device_is_known_by_its_name(monkeypatch):
    names = ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"]
    monkeypatch.setattr(backend, "devices", lambda: {"cpu": {}, "cuda": names})
    assert find_hardware(torch.device("cuda", 1)) is HARDWARE["h100"]
    assert find_hardware(torch.device("cuda")) is None and find_hardware(torch.device("cpu")) is None
    assert stated_peak(torch.device("cpu"), "fp32") is None
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert (stated_peak(device, "bf16"), stated_peak(device, "fp32")) == (989e12, 67e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert stated_peak(device, "fp32") == 494e12


def test_rates_are_measured():
    found = probe(PRESETS["smoke-pretrain"]().model, 100, "fp32", torch.device("cpu"))
    assert 1e8 < found.peaks["fp32"] < 1e13 and 1e8 < found.bandwidth < 1e13 and 1e-7 < found.launch < 1e-2
    assert not found.is_named and not found.asynchronous


@needs_native
def test_launches_are_those_of_the_step(monkeypatch):
    """The narrow network of the count launches what the network itself does."""
    config = PRESETS["smoke-pretrain"]()
    counted = count_launches(config)
    blocks = config.model.num_blocks
    first = counted.of_step(1)
    for op, calls in {"masked_attention": 2 * blocks, "gelu": 2 * blocks, "adamw_ema": 2, "masked_dsm_loss": 2}.items():
        assert first[op] == calls
    assert (first["noise_visible_patches"], first["layer_norm"]) == (1, 2 * (2 * blocks + 1))
    linears = 4 * blocks + 2 * (blocks // 2) + 2
    # addmm; the gradients of weight and x, but for that of the patches; column sums where there is a bias.
    assert 4 * linears - 1 - blocks - blocks // 2 <= first["linear"] <= 4 * linears
    assert first["casts"] == 0 < count_launches(replace(config, precision="bf16")).first["casts"]
    assert count_launches(replace(config, stage=replace(config.stage, mask=NoMask()))).first["rest"] < first["rest"]
    third = counted.of_step(3)
    assert third["adamw_ema"] == 2 and third["gelu"] == 3 * first["gelu"]

    wide = replace(config, stage=replace(config.stage, batch_size=2), precision="bf16")
    stage = build_stage(wide, World(torch.device("cpu")))
    size = config.model.image_size
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    batches = [Batch(image, torch.full((1,), -1), torch.tensor([slot])) for slot in (0, 1)]
    stage.step(batches, 0)
    with torch.profiler.profile() as profile:
        stage.step(batches[:1], 1)
    profiled = Counter(event.name for event in profile.events())
    for name, op in (("native_layer_norm", "layer_norm"), ("native_layer_norm_backward", "layer_norm")):
        assert profiled[f"aten::{name}"] == first[op] / 2


@needs_native
@pytest.mark.parametrize("mask", [PatchMask(0.9), BlockMask(0.75, 2), CropMask(2), PatchMask(0.25, 0.75)])
def test_a_smaller_grid_launches_as_many(monkeypatch, mask):
    config = PRESETS["smoke-pretrain"]()
    config = replace(config, stage=replace(config.stage, mask=mask))
    counted = count_launches(config)
    monkeypatch.setattr(launches, "_smallest_grid", lambda mask, side: side)
    assert count_launches(config) == counted


@needs_native
def test_an_eager_step_of_few_tokens_is_bound_by_launches():
    """The larger the GPU and the smaller the batch; whole images are bound by arithmetic."""
    config = PRESETS["small64-pretrain"]()
    small = estimate(replace(config, stage=replace(config.stage, batch_size=32)))
    assert small.on(HARDWARE["h100"]).step.bound == "launches"
    whole = estimate(PRESETS["small64-finetune"]()).on(HARDWARE["a100"])
    assert whole.step.bound == "compute" and 0.3 < whole.mfu < 0.62
