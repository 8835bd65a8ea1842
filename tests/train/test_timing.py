import time

import pytest
import torch

from maskdm_fast.ops import backend
from maskdm_fast.train import timing
from maskdm_fast.train.timing import StepTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only in `clock(seconds)`, so that sums can be exact."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.fixture
def timer():
    return StepTimer(torch.device("cpu"))


def test_parts_of_an_armed_step_sum_over_micro_batches(timer, clock):
    timer.arm()
    for _ in range(2):
        with timer.part("forward"):
            clock(0.25)
        clock(8.0)
        with timer.part("backward"):
            clock(0.5)
    assert timer.take() == {"forward_ms": 500.0, "backward_ms": 1000.0}
    assert not timer.armed and timer.take() == {}


def test_communication_is_counted_in_what_it_happens_in(timer, clock):
    timer.arm()
    with timer.part("backward"):
        clock(1.0)
        with timer.part("communication"):
            clock(0.5)
    timer.add("communication", 0.25)
    assert timer.take() == {"backward_ms": 1500.0, "communication_ms": 750.0}


def test_a_part_inside_itself_counts_once(timer, clock):
    timer.arm()
    with timer.part("communication"), timer.part("communication"):
        clock(1.0)
    assert timer.take() == {"communication_ms": 1000.0}


def test_an_unarmed_step_measures_nothing_and_does_not_wait(timer, clock, monkeypatch):
    waits = []
    monkeypatch.setattr(backend, "synchronize", waits.append)
    with timer.part("forward"):
        clock(1.0)
    timer.add("communication", 1.0)
    assert timer.take() == {} and waits == []
    timer.arm()
    with timer.part("forward"):
        clock(1.0)
    assert timer.take() == {"forward_ms": 1000.0}
    assert waits == [torch.device("cpu")] * 2


def test_arming_begins_at_zero(timer, clock):
    timer.arm()
    with timer.part("data"):
        clock(1.0)
    timer.arm()
    assert timer.take() == {}


def test_an_error_passes_through_without_a_wait(timer, monkeypatch):
    def wait(device):
        if waits:
            raise RuntimeError("CUDA error of the same kernel again")
        waits.append(device)

    waits = []
    monkeypatch.setattr(backend, "synchronize", wait)
    timer.arm()
    with pytest.raises(ZeroDivisionError), timer.part("forward"):
        raise ZeroDivisionError


def test_an_unarmed_part_makes_nothing(timer):
    """Six parts of every micro-batch must not show beside a step of a millisecond."""
    assert timer.part("forward") is timer.part("backward")
    timer.arm()
    assert timer.part("forward") is not timer.part("backward")


def test_every_part_has_a_name_of_its_own(timer):
    timer.arm()
    for name in timing.PARTS:
        with timer.part(name):
            pass
    assert list(timer.take()) == [f"{name}_ms" for name in timing.PARTS]
    timer.arm()
    with pytest.raises(KeyError, match="foreward"):
        timer.part("foreward")
