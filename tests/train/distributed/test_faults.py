"""Processes that die, fail, hang or disagree: the others end soon and say why, and the run goes on from the newest
whole checkpoint as if nothing had been."""

import functools
import os
import re
import shutil
import signal

import pytest

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.train import checkpoint, train
from maskdm_fast.train.config import DiffusionConfig
from maskdm_fast.train.watchdog import STALLED_EXIT_CODE
from tests.train.distributed.curves import curve, far, far_weights

SOON = 30.0  # seconds; a second on a quiet machine

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nobody may leave a damaged checkpoint


@pytest.fixture
def make_run(make_run):
    """10 steps, with a checkpoint after the 5th."""
    return functools.partial(make_run, num_images=80)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def goes_on(folder, config, reference, finish, *, step):
    """The newest whole checkpoint is that of `step`, nothing else counts, and the run ends as if undisturbed."""
    assert checkpoint.newest(folder).step == step
    finish(config, folder)
    assert checkpoints(folder) == [f"step-{step:08d}" for step in (5, 10)]
    assert far(reference(), folder) < 1e-5
    for which in ("raw", "ema"):
        assert far_weights(reference(), folder, which) < 1e-4


@pytest.mark.parametrize(
    ("engine", "rank", "fault"),
    [
        ("ddp", 1, {"signal_in_step": {"step": 7, "signal": signal.SIGKILL}}),
        ("zero2", 0, {"signal_in_step": {"step": 7, "signal": signal.SIGKILL}}),
        ("zero3", 1, {"signal_in_step": {"step": 7, "signal": signal.SIGKILL}}),
        ("zero3", 1, {"die_in_save": 10}),
        ("ddp", 0, {"die_in_save": 10}),
    ],
)
def test_kill_9_of_one_process(make_run, reference, launch, finish, tmp_path, engine, rank, fault):
    config = make_run(engine)
    ended = launch(config, tmp_path / "run", faults={rank: fault})
    dead, other = ended[rank], ended[1 - rank]
    assert dead.code == -signal.SIGKILL
    assert other.code == 1 and other.seconds - dead.seconds < SOON
    assert other.error.startswith("LostPeerError: lost contact with another process, which has ended"), other.log
    goes_on(tmp_path / "run", config, reference, finish, step=5)


@pytest.mark.parametrize(
    ("rank", "fault", "reason"),
    [
        (1, "full_disk_in_save", "File too large"),
        (0, "full_disk_in_save", "File too large"),
        (0, "read_only_in_save", "Permission denied"),
    ],
)
def test_a_checkpoint_that_one_process_cannot_write(make_run, reference, launch, finish, tmp_path, rank, fault, reason):
    config = make_run("zero2")
    ended = launch(config, tmp_path / "run", faults={rank: {fault: 10}})
    os.chmod(tmp_path / "run" / "checkpoints", 0o755)
    assert [one.code for one in ended] == [1, 1]
    message = rf"CheckpointError: cannot write checkpoint .*step-00000010: .*{reason}.*step-00000005\. Make room"
    assert re.match(message, ended[rank].error), ended[rank].log
    assert re.match(f"PeerError: rank {rank}: {message}", ended[1 - rank].error), ended[1 - rank].log
    assert abs(ended[0].seconds - ended[1].seconds) < SOON
    goes_on(tmp_path / "run", config, reference, finish, step=5)


def test_a_folder_that_cannot_be_written(make_run, launch, tmp_path):
    (tmp_path / "run").write_text("in the way")
    ended = launch(make_run("ddp"), tmp_path / "run")
    assert ended[0].error.startswith("RuntimeError: cannot write to the run folder")
    assert ended[1].error.startswith("PeerError: rank 0: RuntimeError: cannot write to the run folder")


def test_a_folder_that_the_other_process_does_not_see(make_run, launch, tmp_path):
    ended = launch(make_run("ddp"), [tmp_path / "run", tmp_path / "elsewhere"])
    assert "elsewhere is not the one that the main process writes to" in ended[1].error
    assert ended[0].error.startswith("PeerError: rank 1: RuntimeError: the run folder")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("change", ["an image less", "a class of another name"])
def test_a_data_set_that_is_not_that_of_the_other_process(make_run, class_folder, launch, tmp_path, change):
    shutil.copytree(class_folder, tmp_path / "copy")
    if change == "an image less":
        next((tmp_path / "copy" / "2").iterdir()).unlink()
        words = r"shape \(23, 12, 12, 3\) instead of \(24, 12, 12, 3\), checksum \w{40} instead of \w{40}"
    else:
        (tmp_path / "copy" / "2").rename(tmp_path / "copy" / "3")
        words = r"class_names \('0', '1', '3'\) instead of \('0', '1', '2'\)"
    ended = launch([make_run("ddp", data=str(data)) for data in (class_folder, tmp_path / "copy")], tmp_path / "run")
    for one in ended:
        message = rf"ValueError: the data set of rank 1 differs from that of rank 0: {words}\. Give all machines the"
        assert re.match(message, one.error), one.log
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["teacher", "init_from"])
def test_weights_that_are_not_those_of_the_other_process(make_config, make_student, launch, tmp_path, option):
    names = ("one", "two")
    for seed, name in enumerate(names):
        diffusion = DiffusionConfig(prediction="v")
        train(make_config(seed=seed, num_images=4, mask=NoMask(), diffusion=diffusion), tmp_path / name)
    make = make_student if option == "teacher" else make_config
    ended = launch([make(engine="ddp", **{option: str(tmp_path / name)}) for name in names], tmp_path / "run")
    what = "the teacher" if option == "teacher" else rf"--init-from {tmp_path}/\w+"
    for one in ended:
        message = rf"ValueError: {what} of rank 1 differs from that of rank 0: sha256 \w{{40}} instead of \w{{40}}"
        assert re.match(message, one.error), one.log


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_part_that_is_damaged(make_run, reference, finish, tmp_path):
    config, run = make_run("zero3"), tmp_path / "run"
    finish(config, run)
    part = run / "checkpoints" / "step-00000010" / "optimizer-00001-of-00002.safetensors"
    os.truncate(part, part.stat().st_size // 2)
    first, second = finish(config, run)
    assert "falling back to the one before it" in first.log and "falling back" not in second.log
    assert checkpoints(run) == ["damaged-step-00000010", "step-00000005", "step-00000010"]
    assert far(reference(), run) < 1e-5


def test_an_error_in_one_process(make_run, reference, launch, finish, tmp_path):
    config = make_run("zero2")
    ended = launch(config, tmp_path / "run", faults={0: {"error_in_step": {"step": 7, "message": "no memory left"}}})
    assert ended[0].error == "OutOfMemoryError: no memory left"
    assert ended[1].error.startswith("LostPeerError"), ended[1].log
    assert "in step 8. The same command goes on from step 5" in ended[1].error
    assert ended[1].seconds - ended[0].seconds < SOON
    goes_on(tmp_path / "run", config, reference, finish, step=5)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_loss_that_is_not_finite_in_one_process(make_run, launch, tmp_path, engine):
    ended = launch(
        make_run(engine, max_grad_norm=1.0),
        tmp_path / "run",
        faults={1: {"factor_in_step": {"step": 6, "factor": "nan"}}},
    )
    assert [one.error.split(". ")[0] for one in ended] == [
        "TrainingDivergedError: loss became NaN or infinite at step 7"
    ] * 2
    assert checkpoints(tmp_path / "run") == ["step-00000005"]
    assert [row[0] for row in curve(tmp_path / "run")] == [2, 4, 6]


def test_a_process_that_hangs(make_run, reference, launch, finish, tmp_path):
    config = make_run("ddp", stall_seconds=3.0)
    ended = launch(config, tmp_path / "run", faults={1: {"sleep_in_step": {"step": 7, "seconds": 300}}})
    assert ended[1].code == STALLED_EXIT_CODE, ended[1].log
    assert re.search(r"watchdog of rank 1 of 2 \(.*\): step 8 \(train\) has taken", ended[1].log)
    assert "time.sleep(argument" in ended[1].log and "time.sleep(argument" not in ended[0].log
    # The other waits for it, and ends by its own watchdog or because it lost it, whichever comes first.
    assert ended[0].code == STALLED_EXIT_CODE or ended[0].error.startswith("LostPeerError")
    assert max(one.seconds for one in ended) < SOON
    goes_on(tmp_path / "run", config, reference, finish, step=5)


@pytest.mark.parametrize(("engine", "rank"), [("ddp", 1), ("zero3", 0)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(make_run, reference, finish, tmp_path, engine, rank):
    config = make_run(engine)
    fault = {"signal_in_step": {"step": 7, "signal": signal.SIGTERM}}
    ended = finish(config, tmp_path / "run", faults={rank: fault})
    first, second = (one.result for one in ended)
    assert first == second and first["reason"] == "SIGTERM" and 8 <= first["step"] <= 10
    finish(config, tmp_path / "run")
    assert far(reference(), tmp_path / "run") < 1e-5


def test_clocks_that_disagree_stop_all_after_the_same_step(make_run, finish, tmp_path):
    config = make_run("ddp", num_images=10**7, max_seconds=600.0)
    ended = finish(config, tmp_path / "run", faults={1: {"fast_clock": 1e4}})
    first, second = (one.result for one in ended)
    assert first == second and first["reason"] == "max_seconds"
    assert checkpoint.newest(tmp_path / "run").step == first["step"]


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "0"}], ids=["one machine", "two machines, one disk"])
def test_processes_that_pack_the_data_set_at_once(make_run, reference, finish, tmp_path, environment):
    finish(make_run("ddp", cache_dir=str(tmp_path / "cache")), tmp_path / "run", **environment)
    assert len(list((tmp_path / "cache").rglob("*.store"))) == 1
    assert far(reference(), tmp_path / "run") < 1e-5
