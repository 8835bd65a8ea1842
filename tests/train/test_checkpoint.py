import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from maskdm_fast.train import CheckpointError, RunConfig, checkpoint, load_weights
from maskdm_fast.train.world import World

ALONE = World(torch.device("cpu"))


def save(run, step, *, keep=2, value=None):
    value = float(step) if value is None else value
    groups = {
        "model": {"w": torch.full((2, 3), value)},
        "ema": {"w": torch.full((2, 3), value / 2)},
        "optimizer": {"exp_avg.w": torch.zeros(2, 3), "step.w": torch.tensor(step)},
    }
    return checkpoint.save(run, groups, {"step": step, "config": RunConfig().to_dict()}, keep=keep, world=ALONE)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path):
    torch_values = torch.tensor([1.0, float("inf"), -0.0, 1e-45])
    groups = {"model": {"a.b": torch_values, "t": torch.arange(6.0).view(2, 3).t()}, "ema": {}, "optimizer": {}}
    checkpoint.save(tmp_path, groups, {"step": 7}, keep=1, world=ALONE)
    found = checkpoint.newest(tmp_path)
    assert found.step == 7
    assert found.reader.names("ema") == found.reader.names("optimizer") == set()
    loaded = found.tensors("model")
    assert loaded.keys() == groups["model"].keys()
    assert torch.equal(loaded["a.b"].view(torch.int32), torch_values.view(torch.int32))
    assert torch.equal(loaded["t"], groups["model"]["t"])


def test_views_of_one_buffer_can_be_saved(tmp_path):
    flat = torch.arange(6.0)
    checkpoint.save(tmp_path, {"model": {"a": flat[:2], "b": flat[2:]}}, {"step": 1}, keep=1, world=ALONE)
    assert torch.equal(checkpoint.newest(tmp_path).tensors("model")["b"], flat[2:])


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert checkpoint.newest(tmp_path).step == 10


def test_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", [truncate, flip, os.unlink, lambda path: path.write_bytes(b"")])
def test_damage_is_found_and_the_older_one_used(tmp_path, name, damage):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    with pytest.warns(RuntimeWarning, match="step-00000002.*falling back"):
        assert checkpoint.newest(tmp_path).step == 1


def test_nothing_whole_is_an_error(tmp_path):
    truncate(save(tmp_path, 1) / "model.safetensors")
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest(tmp_path)


def test_resume_sets_damaged_ones_aside_and_cleans_leftovers(tmp_path):
    save(tmp_path, 1)
    truncate(save(tmp_path, 2) / "ema.safetensors")
    (tmp_path / "checkpoints" / ".tmp-step-00000003").mkdir()
    with pytest.warns(RuntimeWarning):
        assert checkpoint.resume(tmp_path).step == 1
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    # The damaged one must not count as one of the newest that stay.
    save(tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path).step == 2


def test_a_leftover_is_never_read(tmp_path):
    save(tmp_path, 1)
    os.rename(save(tmp_path, 2), tmp_path / "checkpoints" / ".tmp-step-00000002")
    assert checkpoint.newest(tmp_path).step == 1


def test_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, tensors):
        path.write_bytes(b"partial")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*newest checkpoint is .*step-00000001.*Make room"
    ):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_a_file_size_limit_is_a_clear_error(tmp_path):
    """A real refusal by the kernel, in the safetensors writer itself."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from maskdm_fast.train import checkpoint\n"
        "from maskdm_fast.train.world import World\n"
        "alone = World(torch.device('cpu'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    pieces = {'model': {'w': torch.zeros(10000)}}\n"
        "    checkpoint.save(Path(sys.argv[1]), pieces, {'step': 1}, keep=1, world=alone)\n"
        "except checkpoint.CheckpointError as error:\n"
        "    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "cannot write checkpoint" in out.stdout and "There is no older checkpoint" in out.stdout, out.stderr
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save(tmp_path, 1)


def test_unknown_format(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        checkpoint.read(path)


def test_load_weights(tmp_path):
    path = save(tmp_path / "run", 4)
    assert torch.equal(load_weights(tmp_path / "run").tensors["w"], torch.full((2, 3), 2.0))
    assert torch.equal(load_weights(path, "raw").tensors["w"], torch.full((2, 3), 4.0))
    assert load_weights(path).config == RunConfig()


def test_load_weights_of_a_recipe_takes_the_last_stage_that_has_some(tmp_path):
    save(tmp_path / "1-pretrain", 1)
    save(tmp_path / "2-finetune", 2)
    (tmp_path / "10-distill").mkdir()
    assert load_weights(tmp_path, "raw").checkpoint.path.parent.parent.name == "2-finetune"


def test_load_weights_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_weights(tmp_path)
    with pytest.raises(ValueError, match="which is 'best'"):
        load_weights(tmp_path, "best")


def test_one_process_per_run_folder(tmp_path):
    code = "import sys; from maskdm_fast.train import checkpoint; from pathlib import Path\n"
    code += "with checkpoint.locked(Path(sys.argv[1])): pass"
    with checkpoint.locked(tmp_path):
        out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "another process is training in" in out.stderr
    with checkpoint.locked(tmp_path):
        pass
