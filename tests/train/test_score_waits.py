"""A step of score distillation never makes the host wait for the device."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskdm_fast import random, testing
from maskdm_fast.ops import backend
from maskdm_fast.random import Stream
from maskdm_fast.train.config import DiffusionConfig, RunConfig
from maskdm_fast.train.metrics import Meter
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.world import World
from tests.train.by_hand import WORLD, batch_of, build, teacher_of
from tests.train.test_waits import NoWait, backward, to_fake_cuda

CASES = {
    "sid": {"max_grad_norm": 1.0},
    "one of several steps is trained": {"num_steps": 3, "trained_steps": "one", "precision": "bf16"},
    "classes": {"num_classes": 3, "guidance": "lsg", "guidance_scale": 2.0, "level_draw": "uniform"},
    "sida": {"method": "sida", "freeze_images": 0, "adversarial_from": 0, "activation_checkpointing": True},
    "dmd2": {"method": "dmd2", "fake_updates": 1, "input_level": 10.0, "hflip": 0.5, "num_classes": 3},
    "two updates of the fake network": {"fake_updates": 2, "offload_idle": True},
    "fp16": {"precision": "fp16"},
}


@pytest.fixture
def make(make_student, monkeypatch):
    """`make_student`, with classes. The step that is trained is drawn on the host, which is no wait."""
    uniform = random.uniform

    def drawn(num, *, stream, slots, **rest):
        if stream != Stream.GENERATOR_STEP:
            return uniform(num, stream=stream, slots=slots, **rest)
        assert slots.device.type == "cpu"
        return SimpleNamespace(item=lambda: 0.5)

    monkeypatch.setattr(random, "uniform", drawn)

    def make(num_classes: int = 0, **changes) -> RunConfig:
        config = make_student(**changes)
        return replace(config, model=replace(config.model, num_classes=num_classes))

    return make


def in_two(batch: Batch) -> list[Batch]:
    """Micro-batches of a batch of four."""
    whole = batch.images, batch.labels, batch.slots
    return [Batch(*(tensor[part] for tensor in whole)) for part in torch.arange(4).split(2)]


@pytest.mark.skipif(not backend.has_native(), reason="the reference backend looks at values on the CPU, to check them")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_reads_no_values(make, changes):
    """All of it, on the CPU, once both networks had an update, in which the state of the optimizers was made."""
    config = make(**changes, micro_batch_size=2)
    stage, meter, first = build(config), Meter(WORLD), config.stage.fake_updates or 1
    for step in range(2 * first):
        batches = in_two(batch_of(config, step))
        with contextlib.nullcontext() if step < first else NoWait():
            meter.update(stage.step(batches, step), step + 1)
    meter.check()
    assert "generator_loss" in meter.means()


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
@pytest.mark.parametrize("name", ["one of several steps is trained", "classes", "dmd2"])
def test_a_step_copies_nothing_between_host_and_device(make, name, monkeypatch):
    """On fake tensors on a GPU. The first step copies tables there and makes the optimizers' states."""
    config, world = make(**CASES[name]), World(torch.device("cuda", 0))
    schedule, teacher = config.diffusion.noise_schedule(config.model), teacher_of(config)
    monkeypatch.setattr(DiffusionConfig, "noise_schedule", lambda config, model: schedule)
    build(config).step([batch_of(config, 0)], 0)  # looks up noise levels, whose values fake tensors do not have
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)  # it asks the driver
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.nn.Module, "to", to_fake_cuda)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, meter = build_stage(config, world, None, teacher), Meter(world)
        for step, guard in enumerate((contextlib.nullcontext(), testing.NoTransfer())):
            whole = batch_of(config, step)
            batches = [Batch(*(tensor.to(world.device) for tensor in (whole.images, whole.labels, whole.slots)))]
            with guard:
                values = stage.step(batches, step)
                meter.update(values, step + 1)
    assert "generator_loss" in values
    flat = [part for value in values.values() for part in (value if isinstance(value, tuple) else (value,))]
    assert {value.device for value in flat} == {world.device}
