"""Settings that every test shares."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # xdist runs one process per core; more threads in each, or in what the tests start, would fight over them.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
