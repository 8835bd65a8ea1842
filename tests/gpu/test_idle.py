"""Optimizer state that goes to the CPU and comes back, without a wait for the device."""

import copy

import pytest
import torch

from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings, make_engine
from maskdm_fast.train.idle import IdleState
from maskdm_fast.train.pieces import Held
from maskdm_fast.train.world import World

MODEL = UViTConfig(image_size=16, patch_size=4, dim=64, depth=3, num_heads=2)
FULL = {"betas": (0.9, 0.99), "ema_decay": 0.9}
LEAN = {"betas": (0.0, 0.99), "ema_decay": None}


def make(device, settings):
    optimizer = OptimizerSettings(weight_decay=0.01, max_grad_norm=1.0, max_grad_value=10.0, **settings)
    model, world = UViT(MODEL, seed=1), World(torch.device(device))
    engine = make_engine("plain", model, optimizer, EngineSettings(offload_idle=True), world)
    if device == "cpu":  # where nothing would move
        engine._idle = IdleState(engine._optimizer, engine.device, moves=True)
    return engine


def train(engine, step):
    x = torch.linspace(-1, 1, 2 * 16 * 48, device=engine.device).view(2, 16, 48) * (step + 1)
    t = torch.tensor([1, 5], device=engine.device)
    engine.backward(engine.model(x, t).square().mean())
    engine.step(1e-3)


def moved(engine):
    """Tensors of the state."""
    return [tensor for state in engine._optimizer.state.values() for slot, tensor in state.items() if slot != "step"]


@pytest.mark.parametrize("settings", [FULL, LEAN], ids=["all slots", "one slot"])
def test_rest_changes_no_bit(device, settings):
    awake, engine = make(device, settings), make(device, settings)
    for step in range(4):
        train(awake, step)
        train(engine, step)
        engine.rest()
        assert engine._idle.resting
        wanted, found = awake.pieces(), engine.pieces()
        for group, tensors in wanted.items():
            for name, value in tensors.items():
                assert torch.equal(found[group][name].to(value.device), value), (step, group, name)
        if step == 1:
            engine.load(
                Held({group: {k: v.cpu() for k, v in copy.deepcopy(part).items()} for group, part in wanted.items()})
            )
            assert engine._idle.resting
        if step == 2:
            engine.wake()
            assert not engine._idle.resting


def test_the_host_does_not_wait(device):
    engine = make(device, FULL)
    train(engine, 0)
    engine.rest()  # pinned memory is allocated
    engine.wake()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        engine.rest()
        engine.wake()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not engine._idle.resting


def test_the_memory_of_the_device_is_free(cuda):
    engine = make(cuda, FULL)
    train(engine, 0)
    torch.cuda.synchronize()
    num_bytes, before = sum(tensor.nbytes for tensor in moved(engine)), torch.cuda.memory_allocated()
    engine.rest()
    assert torch.cuda.memory_allocated() <= before - num_bytes
    assert all(engine._idle.held(tensor).is_pinned() for tensor in moved(engine))
    engine.wake()
    assert torch.cuda.memory_allocated() <= before
    assert all(tensor.is_cuda and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in moved(engine))
