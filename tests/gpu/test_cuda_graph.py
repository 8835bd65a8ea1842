"""Training as it runs on a GPU: graphs of forward and backward pass, fed by a thread, without a wait for the device."""

from dataclasses import replace

import pytest
import torch

from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import PatchMask
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.train import RunConfig
from maskdm_fast.train.config import DenoisingConfig, MachineConfig
from maskdm_fast.train.cuda_graph import GraphEngine
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings
from maskdm_fast.train.feed import Feed
from maskdm_fast.train.metrics import Meter
from maskdm_fast.train.stages import DenoisingStage, build_stage
from maskdm_fast.train.world import World

NUM_STEPS = 6


class Images:
    """50 images of noise, in two classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (50, 16, 16, 3), dtype=torch.uint8, generator=generator)
        self.labels, self.nbytes = torch.arange(50) % 2, self.images.nbytes

    def __len__(self) -> int:
        return 50

    def batch(self, indices):
        return self.images[indices], self.labels[indices]


class AtOnce:
    """Stands for a recorder on the CPU, where this shows that the tests themselves are right."""

    def warm_up(self, work):
        return work()

    def record(self, work):
        return work


def make_config(**machine) -> RunConfig:
    """The ratio of its mask falls after two steps, and 8 images go into micro-batches of 3, 3 and 2."""
    return RunConfig(
        model=UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2),
        machine=MachineConfig(micro_batch_size=3, **machine),
        stage=DenoisingConfig(
            mask=PatchMask(0.75), mask_schedule=MaskSchedule("steps", ((0.5, 16),)), batch_size=8, hflip=0.5
        ),
    )


def make_stage(config, device, *, graph):
    world = World(torch.device(device))
    if device == "cuda" or not graph:
        return build_stage(replace(config, machine=replace(config.machine, cuda_graph=graph)), world, None)
    stage = config.stage
    optimizer = OptimizerSettings(stage.betas, stage.weight_decay, stage.max_grad_norm, stage.ema_decay)
    model, settings = UViT(config.model, seed=config.seed), EngineSettings(config.precision)
    return DenoisingStage(config, GraphEngine("plain", model, optimizer, settings, world, AtOnce()), world)


def make_feed(config, device):
    return Feed(config, Images(), World(torch.device(device)), ahead=True)


def steps(stage, feed, first=0, count=NUM_STEPS):
    """The values of each step."""
    found = []
    for step in range(first, first + count):
        found.append({name: value.clone() for name, value in stage.step(feed.batches(step), step).items()})
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replays_train_as_it_runs(precision, device):
    config = replace(make_config(), precision=precision)
    values, weights = [], []
    for graph in (False, True):
        stage, feed = make_stage(config, device, graph=graph), make_feed(config, device)
        values.append(steps(stage, feed))
        weights.append(stage.pieces()["model"])
        feed.close()
    for eager, replayed in zip(*values, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    losses = torch.stack([step["loss"] for step in values[1]])
    assert losses.isfinite().all() and losses.unique().numel() == NUM_STEPS


def test_replays_repeat_bit_for_bit(device):
    found = []
    for _ in range(2):
        stage, feed = make_stage(make_config(), device, graph=True), make_feed(make_config(), device)
        found.append((steps(stage, feed), stage.pieces()["model"]))
        feed.close()
    (values, weights), (again, weights_again) = found
    assert all(torch.equal(one[name], two[name]) for one, two in zip(values, again, strict=True) for name in one)
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


@pytest.mark.parametrize("data_device", ["cpu", "device"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_step_waits_for_the_device(precision, graph, data_device, device):
    """Reading, training and running means: on a GPU, PyTorch raises at anything that makes the host wait."""
    kept = data_device if device == "cuda" else "cpu"
    config = replace(make_config(data_device=kept), precision=precision)
    stage, feed, meter = make_stage(config, device, graph=graph), make_feed(config, device), None
    assert feed.images_on_device == (kept == "device")
    meter = Meter(World(torch.device(device)))
    for values in steps(stage, feed, 0, 3):  # both ratios: everything is compiled, recorded and allocated
        meter.update(values, 1)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for values in steps(stage, feed, 3, 3):
            meter.update(values, 4)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        feed.close()
    meter.check()


@pytest.mark.parametrize("data_device", ["auto", "cpu", "device"])
def test_a_gpu_is_fed_what_the_cpu_is(data_device, cuda):
    plain = Feed(make_config(), Images(), World(torch.device("cpu")))
    feed = make_feed(make_config(data_device=data_device), cuda)
    assert feed.images_on_device == (data_device != "cpu")
    for step in (0, 1, 2, 7, 8, 3, 3, 4):
        # Work that is still queued must not read what the next batches overwrite.
        busy = torch.zeros(1 << 24, device=cuda)
        for _ in range(20):
            busy += 1
        for found, wanted in zip(feed.batches(step), plain.batches(step), strict=True):
            for name in ("images", "labels", "slots"):
                value = getattr(found, name)
                assert value.is_cuda and torch.equal(value.cpu(), getattr(wanted, name))
    feed.close()
