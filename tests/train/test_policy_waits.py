"""A step of DxMI never makes the host wait for the device."""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskdm_fast import testing
from maskdm_fast.ops import backend
from maskdm_fast.train.config import DiffusionConfig, PolicyDistillationConfig
from maskdm_fast.train.metrics import Meter
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.world import World
from tests.train.by_hand import WORLD, batch_of, build, teacher_of
from tests.train.policy_toys import CASES, make_policy_run
from tests.train.test_waits import NoWait, backward


@pytest.fixture
def make(make_student):
    return functools.partial(make_policy_run, make_student)


def in_two(batch: Batch, device: torch.device) -> list[Batch]:
    """Micro-batches of a batch of four."""
    whole = batch.images, batch.labels, batch.slots
    return [Batch(*(tensor[part].to(device) for tensor in whole)) for part in torch.arange(4).split(2)]


@pytest.mark.skipif(not backend.has_native(), reason="the reference backend looks at values on the CPU, to check them")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_reads_no_values(make, changes):
    config = make(**{**changes, "micro_batch_size": 2})
    stage, meter = build(config), Meter(WORLD)
    for step, guard in enumerate((contextlib.nullcontext(), NoWait())):
        batches = in_two(batch_of(config, step), WORLD.device)
        with guard:
            meter.update(stage.step(batches, step), step + 1)
    meter.check()
    assert meter.means()["velocity/0"] > 0


def to_fake_cuda(module, *_):
    """Stands for `Module.to`, which cannot give a fake parameter another device."""
    for part in module.modules():
        part._parameters.update(testing.on_fake_cuda(part._parameters))
        part._buffers.update(testing.on_fake_cuda(part._buffers))
    return module


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
@pytest.mark.parametrize("changes", [CASES["ve"], {**CASES["a value that knows the time"], "precision": "bf16"}])
def test_a_step_copies_nothing_between_host_and_device(make, changes, monkeypatch):
    """On fake tensors on a GPU. The first step copies tables there and makes the optimizers' states."""
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)  # it asks the driver
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.nn.Module, "to", to_fake_cuda)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    config, world = make(**{**changes, "micro_batch_size": 2}), World(torch.device("cuda", 0))
    # What looks at values, which fake tensors do not have, is made before.
    schedule, teacher = config.diffusion.noise_schedule(config.model), teacher_of(config)
    steps, value = config.stage.steps(schedule), config.stage.make_value(config.model, seed=0)
    monkeypatch.setattr(DiffusionConfig, "noise_schedule", lambda config, model: schedule)
    monkeypatch.setattr(PolicyDistillationConfig, "steps", lambda stage, schedule: steps)
    monkeypatch.setattr(PolicyDistillationConfig, "make_value", lambda stage, model, *, seed: value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, meter = build_stage(config, world, None, teacher), Meter(world)
        for step, guard in enumerate((contextlib.nullcontext(), testing.NoTransfer())):
            batches = in_two(batch_of(config, step), world.device)
            with guard:
                values = stage.step(batches, step)
                meter.update(values, step + 1)
    assert {value.device for value in values.values()} == {world.device}
