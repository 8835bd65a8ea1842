"""What launchers say about the processes, and a process alone; several of them are in distributed/test_world.py."""

import os
from datetime import timedelta

import pytest
import torch

from maskdm_fast.train import world as world_module
from maskdm_fast.train.world import LostPeerError, Vote, World, lost_peer, make_world, rank_from_environment

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_JOB_ID": "41235",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-005,9]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher, whatever started the tests; what a test or the code sets is forgotten."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES and "SLURM" not in name}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_a_process_alone():
    world = make_world("cpu")
    assert world == World(CPU) and world.is_main and (world.rank, world.world_size, world.local_rank) == (0, 1, 0)
    assert world.slots(4).tolist() == [0, 1, 2, 3] and world.slots(4).dtype == torch.int64
    assert world.everywhere(lambda: 7) == [7] and world.on_main(lambda: 7) == world.on_each_machine(lambda: 7) == 7
    values = torch.tensor([0.1, 2.0])
    assert torch.equal(world.mean(values), values.double())
    assert torch.equal(world.smallest(torch.tensor([3, 1])), torch.tensor([3, 1]))
    assert not torch.distributed.is_initialized()


def test_errors_of_a_process_alone_are_its_own():
    for way in (World(CPU).everywhere, World(CPU).on_main, World(CPU).on_each_machine):
        with pytest.raises(ZeroDivisionError):
            way(lambda: 1 / 0)


def test_a_vote_of_one_is_heard_at_once():
    box = Vote(World(CPU))
    assert [box.say(code) for code in (0, 2, 0)] == [0, 2, 0] and box.settle() == 0


def test_torchrun_and_deepspeed(environment):
    environment |= {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert world_module._launched() == (5, 8, 1)
    assert rank_from_environment() == (5, 8)


def test_srun(environment):
    environment |= SLURM
    assert world_module._launched() == (3, 4, 1)
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu003", "MASTER_PORT": "21235"}
    assert {name: environment[name] for name in VARIABLES} == wanted
    # What the user says about the address counts more, and what torchrun says about the rank does.
    environment |= {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "RANK": "2"}
    assert world_module._launched() == (2, 4, 1) and environment["MASTER_ADDR"] == "10.0.0.7"


def test_srun_that_says_too_little(environment):
    environment |= {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST '' names no host; set MASTER_ADDR"):
        world_module._launched()
    environment["MASTER_ADDR"] = "10.0.0.7"
    assert world_module._launched() == (3, 4, 1)
    for name, message in (("SLURM_STEP_NUM_TASKS", "WORLD_SIZE=x"), ("SLURM_LOCALID", "LOCAL_RANK=x")):
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del environment[variable]
        with pytest.raises(ValueError, match=f"make no sense: .*{message}"):
            environment |= SLURM | {name: "x"}
            world_module._launched()


def test_a_batch_job_without_srun_is_one_process(environment):
    """sbatch sets variables of the job, but starts the script once."""
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert make_world("cpu") == World(CPU)
    environment |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu7"}
    assert make_world("cpu") == World(CPU)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-005,9]", "gpu003"),
        ("gpu[9,11-12]", "gpu9"),
        ("login1,gpu[1-3]", "login1"),
        ("node-a", "node-a"),
        ("rack2-gpu[07-08],rack3-gpu1", "rack2-gpu07"),
        ("c[1-2]n4", "c1n4"),
        ("r[1-2]n[01-04]", "r1n01"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes, host):
    assert world_module._first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",gpu1"])
def test_a_list_of_nodes_without_a_host(nodes):
    with pytest.raises(ValueError, match="names no host; set MASTER_ADDR"):
        world_module._first_host(nodes)


@pytest.mark.parametrize(
    "said",
    [
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "1"},
        {"WORLD_SIZE": "0"},
    ],
)
def test_variables_that_make_no_sense(environment, said):
    environment |= said
    with pytest.raises(ValueError, match=r"launcher's variables make no sense: RANK=.*start with torchrun"):
        make_world("cpu")
    assert rank_from_environment() == (0, 1)


def test_only_broken_connections_are_lost_processes():
    gloo = "[/pytorch/third_party/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:3000\nand more"
    lost = lost_peer(RuntimeError(gloo))
    assert isinstance(lost, LostPeerError)
    assert str(lost).endswith("(Connection closed by peer [127.0.0.1]:3000)")
    assert lost_peer(RuntimeError("NCCL error: remote process exited")) is not None
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("visible", "local_rank", "taken"), [(8, 3, "cuda:3"), (1, 0, "cuda:0"), (1, 3, "cuda:0"), (8, None, "cuda")]
)
def test_which_gpu_a_process_takes(monkeypatch, visible, local_rank, taken):
    """Its own of several, or the only one that a scheduler shows it."""
    used = []
    monkeypatch.setattr(world_module.backend, "devices", lambda: {"cuda": ["GPU"] * visible})
    monkeypatch.setattr(world_module.backend, "set_device", used.append)
    assert world_module._device("cuda", local_rank) == torch.device(taken)
    assert used == ([] if local_rank is None else [torch.device(taken)])


def test_gpus_that_cannot_be_taken(monkeypatch):
    monkeypatch.setattr(world_module.backend, "devices", lambda: {"cuda": ["GPU"] * 2})
    with pytest.raises(ValueError, match=r"'cuda:2' is not there: PyTorch sees 2 CUDA devices; start fewer processes"):
        world_module._device("cuda", 2)
    with pytest.raises(ValueError, match="'cuda:1' names one GPU for all processes"):
        world_module._device("cuda:1", 0)


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """What waits for the current device would wait for the first, and open a context there."""
    used = []
    monkeypatch.setattr(world_module.backend, "devices", lambda: {"cuda": ["a", "b"]})
    monkeypatch.setattr(world_module.backend, "set_device", used.append)
    assert [world_module._device(name, None) for name in ("cuda:1", "cuda")] == [
        torch.device("cuda:1"),
        torch.device("cuda"),
    ]
    assert used == [torch.device("cuda:1")]


def test_nccl_waits_as_long_as_the_watchdog(monkeypatch):
    calls = []
    monkeypatch.setattr(world_module, "_control", None)
    monkeypatch.setattr(world_module.dist, "init_process_group", lambda *args, **named: calls.append((args, named)))
    monkeypatch.setattr(world_module.dist, "new_group", lambda **named: "control")
    world_module._connect(torch.device("cuda:0"))
    ((args, named),) = calls
    assert args == ("nccl",) and named["timeout"] >= timedelta(days=1)
