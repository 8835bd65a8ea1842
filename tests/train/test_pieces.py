"""Pieces of tensors: whatever way a state was cut, whole tensors and ranges of them read back."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from maskdm_fast.train import CheckpointError, RunConfig, checkpoint, load_weights
from maskdm_fast.train.pieces import FileReader, Fragment, Held, file_name, group_of, share_out, write_pieces

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def draw_tensors(draw: random.Random) -> dict[str, torch.Tensor]:
    shapes = [(), (1,), (27,), (3, 5), (2, 3, 4), (0,), (4, 0)]
    shapes += [tuple(draw.randrange(1, 9) for _ in range(draw.randrange(1, 4))) for _ in range(4)]
    return {
        f"t{number}.weight": torch.arange(torch.Size(shape).numel()).add(number).to(draw.choice(DTYPES)).view(shape)
        for number, shape in enumerate(shapes)
    }


def cut(tensors: dict[str, torch.Tensor], world_size: int, draw: random.Random) -> list[dict]:
    """The pieces of each of several processes: some tensors whole, others in ranges, which may be empty or lie in any
    order."""
    parts: list[dict] = [{} for _ in range(world_size)]
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or draw.random() < 0.3:
            draw.choice(parts)[name] = tensor
            continue
        places = sorted(draw.randint(0, tensor.numel()) for _ in range(world_size - 1))
        ranges = list(zip([0, *places], [*places, tensor.numel()], strict=True))
        draw.shuffle(ranges)
        for part, (start, stop) in zip(parts, ranges, strict=True):
            if stop > start or tensor.numel() == 0:
                part[name] = Fragment(tensor.flatten()[start:stop], start, tuple(tensor.shape))
    return parts


def write(folder: Path, parts: list[dict]) -> FileReader:
    paths = [folder / file_name("model", rank, len(parts)) for rank in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_pieces(path, part)
    return FileReader({"model": paths})


def test_any_cut_reads_back(tmp_path):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed: {seed}")
    draw = random.Random(seed)
    for trial in range(30):
        tensors, world_size = draw_tensors(draw), draw.choice((1, 1, 2, 3, 7))
        (tmp_path / str(trial)).mkdir()
        reader = write(tmp_path / str(trial), cut(tensors, world_size, draw))
        assert set(reader.names("model")) == set(Held({"model": tensors}).names("model")) == set(tensors)
        for name, tensor in tensors.items():
            found = reader.tensor("model", name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor), name
            for _ in range(4):
                start, stop = sorted(draw.randint(0, tensor.numel()) for _ in range(2))
                for one in (reader, Held({"model": tensors})):
                    found = one.fragment("model", name, start, stop)
                    assert found.dtype == tensor.dtype, (name, start, stop)
                    assert torch.equal(found, tensor.flatten()[start:stop]), (name, start, stop)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    write(tmp_path, [{"w": torch.arange(1000.0).view(100, 10)}])
    reader = FileReader({"model": [tmp_path / "model.safetensors"]})
    (piece,) = reader._pieces("model")["w"]
    asked = []

    class Spy:
        def get_slice(self, name):
            return self

        def __getitem__(self, rows):
            asked.append(rows)
            return torch.arange(1000.0).view(100, 10)[rows]

    object.__setattr__(piece, "file", Spy())
    assert torch.equal(reader.fragment("model", "w", 25, 48), torch.arange(25.0, 48.0))
    assert asked == [slice(2, 5)]


@pytest.mark.parametrize(("lost", "missing"), [(0, "values 0 to 26"), (1, "values 10 to 26"), (2, "values 20 to 26")])
def test_a_lost_piece_is_an_error(tmp_path, lost, missing):
    values = torch.arange(27.0)
    parts = [{"b": Fragment(values[start : start + 10], start, (27,))} for start in (0, 10, 20)]
    write(tmp_path, parts)
    paths = [tmp_path / file_name("model", rank, 3) for rank in range(3) if rank != lost]
    reader = FileReader({"model": paths})
    with pytest.raises(ValueError, match=f"{missing} of model b are in none of the files"):
        reader.tensor("model", "b")
    there = (10, 20) if lost == 0 else (0, 10)
    assert torch.equal(reader.fragment("model", "b", *there), values[slice(*there)])


def test_a_group_without_files():
    assert list(FileReader({}).names("loss_scale")) == list(Held({}).names("loss_scale")) == []


def test_shares_are_balanced_and_the_same_everywhere():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed: {seed}")
    draw = random.Random(seed)
    for world_size in (1, 2, 3, 8):
        sizes = {f"t{number}": draw.choice((1, 16, 1024, 65536)) for number in range(60)}
        ranks = share_out(sizes, world_size)
        shuffled = draw.sample(list(sizes.items()), len(sizes))
        assert ranks == share_out(dict(shuffled), world_size) and ranks.keys() == sizes.keys()
        loads = [sum(size for name, size in sizes.items() if ranks[name] == rank) for rank in range(world_size)]
        assert max(loads) - min(loads) <= max(sizes.values())
    assert share_out({}, 4) == {}


@pytest.mark.parametrize(
    ("group", "rank", "world_size", "name"),
    [
        ("model", 0, 1, "model.safetensors"),
        ("loss_scale", 1, 2, "loss_scale-00001-of-00002.safetensors"),
        ("ema", 99_999, 123_456, "ema-99999-of-123456.safetensors"),
        ("teacher-2", 0, 2, "teacher-2-00000-of-00002.safetensors"),
    ],
)
def test_names_of_files(group, rank, world_size, name):
    assert file_name(group, rank, world_size) == name
    assert group_of(name) == group


def test_checkpoints_of_format_1_are_read(tmp_path):
    """As version 0.1 wrote them: one process, whole tensors, no metadata."""
    from safetensors.torch import save_file

    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    weight = torch.arange(6.0).view(2, 3)
    save_file({"w": weight}, folder / "model.safetensors")
    save_file({"w": weight / 2}, folder / "ema.safetensors")
    save_file({"exp_avg.w": weight / 3, "step.w": torch.tensor(3)}, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 3, "config": RunConfig().to_dict()}))
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    found = checkpoint.resume(tmp_path)
    assert found.step == 3 and torch.equal(load_weights(tmp_path).tensors["w"], weight / 2)
    assert torch.equal(found.reader.fragment("optimizer", "exp_avg.w", 2, 5), weight.flatten()[2:5] / 3)
    assert found.reader.tensor("optimizer", "step.w") == 3
    (folder / "manifest.json").write_text(json.dumps({"format": 3, "files": files}))
    with pytest.raises(CheckpointError, match="has format 3"):
        checkpoint.read(folder)
