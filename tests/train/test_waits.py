"""A training step never makes the host wait for the device. Packed masks do, once per micro-batch, and say so."""

import contextlib
import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast import testing
from maskdm_fast.diffusion.masking import BlockMask, CropMask, NoMask, PatchMask
from maskdm_fast.ops import backend
from maskdm_fast.train.config import DiffusionConfig, RunConfig
from maskdm_fast.train.metrics import Meter
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.world import World

READS_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal"}


class NoWait(TorchDispatchMode):
    """Refuses operators for which, on a GPU, the host reads values of tensors: their own, or to know a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert name not in READS_VALUES, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            booleans = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not booleans, f"{func} with a mask waits for the device"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, f"{func} without output_size waits for the device"
        return func(*args, **(kwargs or {}))


CHANGES = {
    "masked": {"mask": PatchMask(0.5)},
    "blocks, mirrored, in micro-batches": {"mask": BlockMask(0.5, 2), "hflip": 0.5, "micro_batch_size": 2},
    "a window, bf16": {"mask": CropMask(2), "precision": "bf16", "activation_checkpointing": True},
    "whole, with classes": {"mask": NoMask(), "class_conditional": True, "label_drop": 0.1},
    "edm": {"diffusion": DiffusionConfig("edm", "edm", timesteps="lognormal", stratified=True)},
    "vp, weighted": {"diffusion": DiffusionConfig("vp", "v", loss_weight="min-snr")},
    "log-normal times of a table": {"diffusion": DiffusionConfig("linear", "x0", timesteps="lognormal")},
    "fp16": {"precision": "fp16"},
}


def make(make_config, changes) -> RunConfig:
    config = make_config(**changes)
    return replace(config, model=replace(config.model, num_classes=3)) if config.class_conditional else config


def batches_of(config, device) -> list[Batch]:
    size, model = config.stage.batch_size, config.model
    shape = (size, model.image_size, model.image_size, model.channels)
    slots = World(device).micro_batches(size, config.machine.micro_batch_size)
    images = torch.arange(math.prod(shape), device=device).to(torch.uint8).view(shape)
    labels = torch.arange(size, device=device) % 3
    lengths = [len(part) for part in slots]
    parts = zip(images.split(lengths), labels.split(lengths), slots, strict=True)
    return [Batch(images, labels, slots.to(device)) for images, labels, slots in parts]


@pytest.mark.skipif(not backend.has_native(), reason="the reference backend looks at values on the CPU, to check them")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_step_reads_no_values(make_config, changes):
    """All of it, on the CPU: draws, network, loss, backward pass, optimizer, and the running means."""
    config, world = make(make_config, changes), World(torch.device("cpu"))
    stage, meter, batches = build_stage(config, world), Meter(world), batches_of(config, world.device)
    for step, guard in enumerate((contextlib.nullcontext(), NoWait())):
        with guard:
            meter.update(stage.step(batches, step), step + 1)
    meter.check()
    assert math.isfinite(meter.means()["loss"])


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_step_copies_nothing_between_host_and_device(make_config, changes, monkeypatch):
    """All of it, on fake tensors on a GPU. The first step copies tables there and makes the optimizer's state."""
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)  # it asks the driver
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.nn.Module, "to", to_fake_cuda)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    config, world = make(make_config, changes), World(torch.device("cuda", 0))
    schedule = config.diffusion.noise_schedule(config.model)  # checks its values, which fake tensors do not have
    monkeypatch.setattr(DiffusionConfig, "noise_schedule", lambda config, model: schedule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, meter, batches = build_stage(config, world), Meter(world), batches_of(config, world.device)
        for step, guard in enumerate((contextlib.nullcontext(), testing.NoTransfer())):
            with guard:
                values = stage.step(batches, step)
                meter.update(values, step + 1)
    assert {value.device for value in values.values()} == {world.device}


def to_fake_cuda(module, device):
    """Stands for `Module.to`, which cannot give a fake parameter another device."""
    for part in module.modules():
        part._parameters.update(testing.on_fake_cuda(part._parameters))
    return module


def backward(loss):
    """Stands for `Tensor.backward`, whose engine wants the streams of a real device."""
    grads = defaultdict(dict)
    order, seen = [], set()

    def visit(node):
        if node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                if following is not None:
                    visit(following)
            order.append(node)

    visit(loss.grad_fn)
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(order):
        given = [grads[node].get(place) for place in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
            continue
        with torch.no_grad():
            is_ours = isinstance(node, torch.autograd.function.BackwardCFunction)
            found = node.apply(*given) if is_ours else node(*given)
        found, wanted = list(found) if isinstance(found, tuple) else [found], list(node.next_functions)
        if is_ours:  # answers None for arguments that are no tensors, which have no place among the functions
            found = [grad for grad in found if grad is not None]
            wanted = [function for function in wanted if function[0] is not None]
        for (following, place), grad in zip(wanted, found, strict=True):
            if following is not None and grad is not None:
                like = following._input_metadata[place]
                grad = grad.sum_to_size(like.shape).to(like.dtype)
                grads[following][place] = grads[following][place] + grad if place in grads[following] else grad


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
def test_the_stand_in_for_backward_is_right():
    """Otherwise a part of the backward pass might not be looked at."""
    x = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
    w = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
    loss = torch.cat((x @ w, (x @ w).relu() * 2), dim=1).split(4, dim=1)[1].square().sum() + x.sum()
    wanted = torch.autograd.grad(loss, (x, w), retain_graph=True)
    backward(loss)
    assert all(torch.allclose(leaf.grad, grad) for leaf, grad in zip((x, w), wanted, strict=True))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.index_put((x > 0,), torch.zeros(())),
        lambda x: torch.arange(4).repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_refused(waits):
    with NoWait(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(4))


def test_a_packed_mask_waits_once(make_config):
    """As documented: how many patches are visible in all is known to the device alone."""
    config = make_config(mask=PatchMask(0.25, 0.75))
    world = World(torch.device("cpu"))
    stage, batches = build_stage(config, world), batches_of(config, world.device)
    with NoWait(), pytest.raises(AssertionError, match="nonzero"):
        stage.step(batches, 0)
