import copy

import pytest
import torch
from torch import nn

from maskdm_fast.train import engine as engines
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings
from maskdm_fast.train.idle import IdleState
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_call_without_autograd_takes_no_gradient_from_a_later_one(precision):
    """As a student's target by itself, or a generator's earlier steps. Versions of PyTorch that keep casts of weights
    made without autograd give the weights no gradient then; so none are kept, by any version."""
    gradients = []
    for before in (False, True):
        engine, x = make_engine(precision=precision), torch.linspace(-1, 1, 8).view(2, 4)
        with engine.autocast():
            assert precision == "fp32" or not torch.is_autocast_cache_enabled()
            if before:
                with torch.no_grad():
                    engine.model(x)
            engine.backward(engine.model(x).float().square().mean())
        gradients.append([weight.grad for weight in engine.model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_an_engine_without_an_average():
    engine = make_engine(betas=(0.0, 0.99), ema_decay=None)
    with pytest.raises(RuntimeError, match="there is no average of the weights"):
        engine.averaged()
    train_steps(engine, 0, 2)
    state = copy.deepcopy(engine.pieces())
    assert sorted(state) == ["model", "optimizer"]
    slots = {f"{slot}.{name}" for slot in ("step", "exp_avg_sq") for name in ("weight", "bias")}
    assert state["optimizer"].keys() == slots
    fresh = make_engine(betas=(0.0, 0.99), ema_decay=None)
    fresh.load(Held(state))
    train_steps(engine, 2, 4)
    train_steps(fresh, 2, 4)
    assert_equal(engine.pieces(), fresh.pieces())


def test_a_loss_scale_is_not_blinded():
    settings = OptimizerSettings((0.9, 0.99), 0.0, None, 0.9, max_grad_value=1.0)
    with pytest.raises(ValueError, match=r"max_grad_value is 1\.0, which would hide the overflows"):
        engines.make_engine("plain", nn.Linear(1, 1), settings, EngineSettings("fp16"), World(CPU))


def can_rest(engine):
    """The engine as on a GPU: its state moves, here from the CPU to the CPU."""
    engine._idle = IdleState(engine._optimizer, CPU, moves=True)
    return engine


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rest_at_any_time_changes_no_bit(precision):
    awake, engine = make_engine(precision), can_rest(make_engine(precision))
    engine.rest()  # there is nothing yet
    calls = [("rest",), ("rest", "rest"), ("rest", "wake"), ("wake",), (), ("rest", "wake", "rest")]
    for step, names in enumerate(calls):
        train_steps(awake, step, step + 1)
        train_steps(engine, step, step + 1)
        for name in names:
            getattr(engine, name)()
        assert engine._idle.resting == (names[-1:] == ("rest",))
        assert_equal(copy.deepcopy(awake.pieces()), copy.deepcopy(engine.pieces()))
        for name, value in awake.averaged().items():
            assert torch.equal(value, engine.averaged()[name])


def test_a_network_that_rests_is_loaded_and_rests_on():
    engine, other = can_rest(make_engine()), make_engine()
    train_steps(engine, 0, 2)
    train_steps(other, 0, 4)
    engine.rest()
    engine.load(Held(copy.deepcopy(other.pieces())))
    assert engine._idle.resting
    assert_equal(engine.pieces(), other.pieces())
    train_steps(engine, 4, 6)
    train_steps(other, 4, 6)
    assert_equal(engine.pieces(), other.pieces())


def test_rest_gives_the_memory_of_the_state_back():
    """Views of it, as DeepSpeed keeps them, see it come again."""
    engine = can_rest(make_engine())
    train_steps(engine, 0, 1)
    state = engine._optimizer.state[engine.model.weight]
    tensors = [state[slot] for slot in ("exp_avg", "exp_avg_sq", "ema")]
    views, values = [tensor[1] for tensor in tensors], [tensor.clone() for tensor in tensors]
    engine.rest()
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 3
    assert torch.equal(engine._idle.held(tensors[0]), values[0])
    engine.wake()
    for tensor, view, value in zip(tensors, views, values, strict=True):
        assert torch.equal(tensor, value) and torch.equal(view, value[1])
        assert engine._idle.held(tensor) is tensor


def test_there_is_nowhere_to_rest_on_the_cpu():
    engine = make_engine()
    train_steps(engine, 0, 1)
    engine.rest()
    assert not engine._idle.resting and engine._optimizer.state[engine.model.weight]["ema"].untyped_storage().nbytes()


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
