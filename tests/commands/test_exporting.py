"""Export: one file with the weights of a run, which is as good as the run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from maskdm_fast.cli import main
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.train import RunConfig, export, load_weights
from maskdm_fast.train.checkpoint import save
from maskdm_fast.train.pieces import Fragment
from maskdm_fast.train.world import World

MODEL = UViTConfig(image_size=8, patch_size=2, dim=16, depth=3, num_heads=2)


def halves(tensors, rank):
    """What one of two processes has when every tensor is cut in two."""
    pieces = {}
    for name, tensor in tensors.items():
        middle = tensor.numel() // 3
        start, stop = ((0, middle), (middle, tensor.numel()))[rank]
        if stop > start:
            pieces[name] = Fragment(tensor.detach().flatten()[start:stop], start, tuple(tensor.shape))
    return pieces


@pytest.fixture(params=[1, 2], ids=["one-process", "two-processes"])
def run(request, tmp_path, monkeypatch):
    """A run folder with a checkpoint, and the averaged and the raw weights in it."""
    weights = {which: UViT(MODEL, seed=seed).state_dict() for seed, which in enumerate(("ema", "model"))}
    folder = tmp_path / "run"
    state = {"step": 3, "images": 12, "config": RunConfig(model=MODEL).to_dict(), "class_names": []}
    if request.param == 1:
        save(folder, weights, state, keep=1, world=World(torch.device("cpu")))
        return folder, weights["ema"], weights["model"]
    world = World(torch.device("cpu"), 0, 2)
    other = World(torch.device("cpu"), 1, 2)
    # Both processes in turn: the other one writes when this one would wait for it.
    monkeypatch.setattr(World, "on_main", lambda self, function: function())

    def in_turn(self, function):
        from maskdm_fast.train import checkpoint

        second = {group: halves(tensors, 1) for group, tensors in weights.items()}
        temporary = folder / "checkpoints" / ".tmp-step-00000003"
        files = {}
        for group, pieces in second.items():
            name = checkpoint.file_name(group, other.rank, other.world_size)
            checkpoint._write_tensors(temporary / name, pieces)
            files[name] = checkpoint.fingerprint(temporary / name)
        return [function(), files]

    monkeypatch.setattr(World, "everywhere", in_turn)
    first = {group: halves(tensors, 0) for group, tensors in weights.items()}
    save(folder, first, state, keep=1, world=world)
    return folder, weights["ema"], weights["model"]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_any_reader_of_safetensors_reads_it(run, tmp_path, capsys):
    folder, ema, raw = run
    for which, wanted in (("ema", ema), ("raw", raw)):
        out = tmp_path / "new" / f"{which}.safetensors"
        assert main(["export", str(folder), str(out), "--weights", which]) == 0
        assert f"{which} weights of {folder}" in capsys.readouterr().out
        assert_equal(load_file(out), wanted)
        with safe_open(out, framework="pt") as file:
            assert json.loads(file.metadata()["maskdm_fast"])["step"] == 3
        model = UViT(MODEL)
        model.load_state_dict(load_file(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_are_rounded_once(run, tmp_path, dtype):
    folder, ema, _ = run
    export(folder, tmp_path / "short.safetensors", dtype=dtype)
    assert_equal(load_file(tmp_path / "short.safetensors"), {name: tensor.to(dtype) for name, tensor in ema.items()})


def test_it_takes_the_place_of_the_run(run, tmp_path):
    folder, ema, _ = run
    out = tmp_path / "one.safetensors"
    export(folder, out)
    weights = load_weights(out)
    assert_equal(weights.tensors, ema)
    assert weights.config == load_weights(folder).config
    again = tmp_path / "again.safetensors"
    export(out, again)
    assert again.read_bytes() == out.read_bytes()
    assert main(["sample", str(out), "--num-images", "2", "--steps", "2", "--out", str(tmp_path / "grid.png")]) == 0
    with pytest.raises(ValueError, match="holds the ema weights, not the raw ones"):
        load_weights(out, "raw")


def test_a_failed_export_leaves_what_is_there(run, tmp_path, monkeypatch):
    out = tmp_path / "one.safetensors"
    out.write_bytes(b"older")
    monkeypatch.setattr("maskdm_fast.train.pieces.os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run[0], out)
    assert out.read_bytes() == b"older" and sorted(path.name for path in tmp_path.iterdir()) == [
        "one.safetensors",
        "run",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "new/x.safetensors"], "no such run or checkpoint folder"),
        (["nowhere", "folder.safetensors"], "folder.safetensors is a folder: want the name of a file"),
        ([".", "x.pt"], "'x.pt' is no name for the file: want one like x.safetensors"),
        (["other.txt", "x.safetensors"], "was not written by maskdm-fast export"),
    ],
)
def test_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("not weights")
    Path("folder.safetensors").mkdir()
    assert main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()
