import copy

import pytest
import torch
from torch import nn

from maskdm_fast.train.engine import EngineSettings, OptimizerSettings
from maskdm_fast.train.pieces import Held
from maskdm_fast.train.plain_engine import DataParallelEngine, PlainEngine
from maskdm_fast.train.world import World, make_world

CPU = torch.device("cpu")


def make_engine(precision="fp32", num_micro=1, **changes) -> PlainEngine:
    torch_free = nn.Linear(4, 3)
    with torch.no_grad():
        torch_free.weight.copy_(torch.arange(12.0).view(3, 4) / 10)
        torch_free.bias.zero_()
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.01, "max_grad_norm": 1.0, "ema_decay": 0.9, **changes}
    return PlainEngine(torch_free, OptimizerSettings(**settings), EngineSettings(precision, num_micro), World(CPU))


def train_steps(engine, first, last):
    for step in range(first, last):
        x = torch.linspace(-1, 1, 8).view(2, 4) * (step + 1)
        with engine.autocast():
            loss = engine.model(x).square().mean()
        engine.backward(loss)
        engine.step(lr=0.01 * (step + 1))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name, value in a[group].items():
            assert torch.equal(value, b[group][name]), (group, name)


def test_state_continues_bit_for_bit():
    whole = make_engine()
    train_steps(whole, 0, 5)
    first = make_engine()
    train_steps(first, 0, 2)
    state = copy.deepcopy(first.pieces())
    second = make_engine()
    second.load(Held(state))
    train_steps(second, 2, 5)
    assert_equal(whole.pieces(), second.pieces())


def test_state_before_the_first_step():
    engine = make_engine()
    state = engine.pieces()
    assert state["optimizer"]["step.weight"] == 0
    assert torch.equal(state["ema"]["weight"], state["model"]["weight"])
    fresh = make_engine()
    fresh.load(Held(copy.deepcopy(state)))
    train_steps(engine, 0, 2)
    train_steps(fresh, 0, 2)
    assert_equal(engine.pieces(), fresh.pieces())


def test_step_returns_the_norm_before_clipping_and_forgets_the_gradient():
    engine = make_engine()
    engine.backward(engine.model(torch.full((1, 4), 100.0)).sum())
    norm = torch.cat([p.grad.flatten() for p in engine.model.parameters()]).norm()
    assert norm > 1.0
    torch.testing.assert_close(engine.step(lr=0.1)["grad_norm"], norm)
    assert all(p.grad is None for p in engine.model.parameters())


def test_precision_is_that_of_the_matrix_products():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        engine = make_engine(precision=precision)
        with engine.autocast():
            assert engine.model(torch.ones(1, 4)).dtype == dtype
        assert engine.model.weight.dtype == torch.float32


@pytest.mark.parametrize(("batch_size", "world_size", "micro"), [(8, 1, None), (9, 3, 2), (12, 2, 4), (12, 2, 100)])
def test_micro_batches_of_all_ranks_are_the_batch(batch_size, world_size, micro):
    cut = [World(CPU, rank, world_size).micro_batches(batch_size, micro) for rank in range(world_size)]
    assert torch.equal(torch.cat([slots for part in cut for slots in part]), torch.arange(batch_size))
    assert len({len(part) for part in cut}) == 1
    sizes = [len(slots) for part in cut for slots in part]
    assert max(sizes) <= (micro or batch_size) and max(sizes) - min(sizes) <= 1


def test_a_batch_that_cannot_be_shared_evenly():
    with pytest.raises(ValueError, match=r"batch_size 10 cannot be divided evenly among 4 processes.*such as 12"):
        World(CPU, 0, 4).slots(10)


def test_engines_want_their_number_of_processes():
    settings = OptimizerSettings((0.9, 0.99), 0, None, 0.9), EngineSettings()
    with pytest.raises(ValueError, match="there are 2; use --engine ddp"):
        PlainEngine(nn.Linear(1, 1), *settings, World(CPU, 0, 2))
    with pytest.raises(ValueError, match="there is one; use torchrun"):
        DataParallelEngine(nn.Linear(1, 1), *settings, World(CPU))


@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "not known"), ("meta", "not supported"), ("cuda:99", "not there")]
)
def test_devices_that_do_not_exist(device, message):
    with pytest.raises(ValueError, match=message):
        make_world(device)
