"""The split of a step's time where work is launched ahead."""

import torch

from maskdm_fast.train.timing import StepTimer


def test_work_is_counted_where_it_was_launched(cuda):
    timer = StepTimer(torch.device(cuda))
    x = torch.ones(4096, 4096, device=cuda)
    for _ in range(2):  # the first time loads the library of matrix products
        timer.arm()
        with timer.part("forward"):
            for _ in range(20):
                x = x @ x * 0.0
        with timer.part("backward"):
            pass
        split = timer.take()
    assert split["forward_ms"] > 1.0 > split["backward_ms"]


def test_a_part_may_be_recorded_into_a_graph(cuda):
    """A wait would end the capture with an error."""
    timer = StepTimer(torch.device(cuda))
    x = torch.ones(8, device=cuda)
    timer.arm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), timer.part("forward"):
        x += 1.0
    graph.replay()
    assert x.tolist() == [2.0] * 8
    assert timer.take().keys() == {"forward_ms"}
