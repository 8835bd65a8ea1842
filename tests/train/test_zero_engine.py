"""What DeepSpeed is told; what it does is in distributed/."""

import os

import pytest
import torch

from maskdm_fast.train import world
from maskdm_fast.train.zero_engine import tell_device

OPEN_MPI = "OMPI_COMM_WORLD_LOCAL_RANK"


@pytest.mark.parametrize(
    ("launched", "device", "told"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "cuda:0", "0"),  # a scheduler shows each process one GPU
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", OPEN_MPI: "3"}, "cuda:0", "0"),
        ({}, "cuda:1", "1"),  # one process, --device cuda:1
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu", "1"),
        ({}, "cpu", "0"),
    ],
)
def test_deepspeed_takes_the_device_of_the_process(monkeypatch, launched, device, told):
    """It would take the GPU that LOCAL_RANK numbers. What the launcher said is not forgotten."""
    monkeypatch.setattr(os, "environ", launched)
    before = world._launched()
    for _ in range(2):
        tell_device(torch.device(device))
        assert launched["LOCAL_RANK"] == launched.get(OPEN_MPI, told) == told
        assert world._launched() == before
