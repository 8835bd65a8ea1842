import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast.train.loss_scale import LossScale

CPU = torch.device("cpu")
FINE, OVERFLOW = torch.tensor(0.0), torch.tensor(1.0)


def scale_after(scale: LossScale, steps: str) -> list[float]:
    """The scale after each step: ``.`` of one whose gradient is finite, ``!`` of one whose gradient is not."""
    scales = []
    for step in steps:
        scale.update(OVERFLOW if step == "!" else FINE)
        scales.append(scale.scale.item())
    return scales


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(LossScale, "initial", 8.0)
    monkeypatch.setattr(LossScale, "growth_interval", 3)
    return LossScale(CPU)


def test_constants_are_those_of_pytorch():
    theirs = torch.amp.GradScaler("cpu")
    ours = LossScale(CPU)
    assert ours.scale == theirs._init_scale and ours.growth_interval == theirs.get_growth_interval()
    assert (theirs.get_growth_factor(), theirs.get_backoff_factor()) == (2.0, 0.5)


def test_grows_after_an_interval_without_overflow(quick):
    assert scale_after(quick, ".......") == [8, 8, 16, 16, 16, 32, 32]


def test_an_overflow_halves_and_starts_the_interval_again(quick):
    assert scale_after(quick, "..!..!...") == [8, 8, 4, 4, 4, 2, 2, 2, 4]
    assert scale_after(quick, "!!!") == [2, 1, 0.5]


def test_follows_pytorch(quick):
    """The scale, through any sequence of overflows, against `torch.amp.GradScaler`."""
    steps = "...!..!!....!......!"
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    wanted = []
    for step in steps:
        theirs.scale(weight * (math.inf if step == "!" else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        wanted.append(theirs.get_scale())
    assert scale_after(quick, steps) == wanted


def test_an_overflow_at_the_least_scale_is_divergence(quick, monkeypatch):
    monkeypatch.setattr(LossScale, "least", 1.0)
    told = [quick.update(OVERFLOW).item() for _ in range(5)]  # at 8, 4, 2, 1, 1/2
    assert told == [1, 1, 1, 0, 0]
    assert quick.update(FINE).item() == 0


def test_gradients_beyond_float16_find_their_scale():
    """As those of score distillation, whose loss is a sum: at a scale of 1 they overflow."""
    scale, gradient = LossScale(CPU), torch.tensor(1e6)
    told = []
    for _ in range(40):
        overflow = (gradient * scale.scale).to(torch.float16).isinf()
        told.append(bool(scale.update(overflow.to(torch.float32))))
    assert told == [True] * 20 + [False] * 20 and scale.scale == 2.0**-4


@pytest.mark.parametrize("done", range(6))
def test_continues(quick, done):
    steps = "..!...!."
    whole = scale_after(quick, steps)
    first = LossScale(CPU)
    scale_after(first, steps[:done])
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == {"scale": (), "streak": ()}
    second = LossScale(CPU)
    kept = second.scale
    second.load_state_dict(state)
    assert second.scale is kept, "a CUDA graph reads the scale where it was"
    assert scale_after(second, steps[done:]) == whole[done:]


def test_nothing_waits_for_the_device(quick):
    class NoRead(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), function
            return function(*args, **(kwargs or {}))

    where = quick.scale.data_ptr()
    with NoRead():
        quick.update(OVERFLOW)
        quick.update(FINE)
    assert quick.scale.data_ptr() == where and quick.scale == 4
