import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from maskdm_fast import cli
from maskdm_fast.commands import PackOptions, SampleOptions
from maskdm_fast.data import DataOrder, ImageStore, LatentScaling, TarSource

MODEL = ("--image-size", 8, "--patch-size", 2, "--dim", 16, "--depth", 3, "--num-heads", 2)
BATCH = ("--batch-size", 4, "--log-images", 4, "--hflip", 0, "--preview-images", 0, "--device", "cpu")
TRAIN = ("train", "smoke-pretrain", *MODEL, *BATCH)


@pytest.fixture
def shards(tmp_path):
    """20 images of two classes in two shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:02d}.tar")) as writer:
            for number in range(10 * shard, 10 * shard + 10):
                writer.write({"__key__": f"{number:03d}", "png": pixels[number], "cls": number % 2})
    return folder


@pytest.fixture
def latents(tmp_path):
    """16 latents of two classes, in the scale of an autoencoder."""
    z = np.random.default_rng(1).normal(0.3, 5.0, (16, 4, 8, 8)).astype(np.float16)
    np.save(tmp_path / "z.npy", z)
    np.save(tmp_path / "z-labels.npy", np.arange(16) % 2)
    return tmp_path / "z.npy"


def _weights(folder):
    """Bytes of all tensors in the newest checkpoint."""
    newest = max((folder / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def test_shards_become_a_store_that_trains_like_them(shards, tmp_path, run, capsys):
    pattern = str(shards / "{00..01}.tar")
    assert run("pack", pattern, "out.store", "--image-size", 8, "--shard-gib", 8 * 192 / 2**30) == 0
    text = capsys.readouterr().out
    assert "out.store: 20 images of 8x8x3 (height, width, channels), 2 classes, 0.0 MiB in 3 files, in 0:0" in text
    assert ImageStore.open("out.store").labels.tolist() == [0, 1] * 10
    for name, options in (
        ("store", ("--data", "out.store")),
        ("packed", ("--data", shards)),
        ("live", ("--data", pattern, "--decoding", "on-the-fly")),
    ):
        assert run(*TRAIN, *options, "--class-conditional", "--num-images", 12, "--out", name) == 0
    weights = _weights(tmp_path / "store")
    assert weights and weights == _weights(tmp_path / "packed") == _weights(tmp_path / "live")
    assert len(list((tmp_path / "cache" / "maskdm_fast").glob("*.index.npz"))) == 1  # pack and train share the index


def test_shards_are_scored_without_packing_them(shards, tmp_path, run, capsys):
    assert run("pack", shards, "out.store", "--image-size", 8) == 0
    found = []
    for data in (shards, "out.store"):
        assert (
            run("evaluate", data, "--data", "out.store", "--image-size", 8, "--neighbours", 2, "--out", "e.json") == 0
        )
        found.append(json.loads((tmp_path / "e.json").read_text())["sets"][0]["scores"])
    assert found[0] == found[1] and not list((tmp_path / "cache" / "maskdm_fast").glob("*.store"))


def test_a_run_on_shards_goes_on_without_replay(shards, tmp_path, run, monkeypatch):
    options = (*TRAIN, "--data", shards, "--decoding", "on-the-fly")
    assert run(*options, "--num-images", 20, "--out", "whole") == 0
    assert run(*options, "--num-images", 12, "--out", "parts") == 0
    opened, real = [], TarSource.open
    monkeypatch.setattr(TarSource, "open", lambda self, index: opened.append(index) or real(self, index))
    assert run(*options, "--num-images", 20, "--out", "parts") == 0
    # Steps 4 and 5, and nothing of the first three; the step after may have been read ahead.
    assert sorted(opened[:8]) == sorted(DataOrder(20, 0).indices(12, 8).tolist()) and len(opened) <= 12
    assert _weights(tmp_path / "whole") == _weights(tmp_path / "parts")


def test_latents_from_import_to_samples(latents, tmp_path, run, capsys):
    assert run("pack", latents, "z.store", "--scale", 0.2, "--shift", 0.3) == 0
    text = capsys.readouterr().out
    assert "z.store: 16 latents of 8x8x4" in text and "2 classes" in text
    assert "standard deviation 1.0" in text or "standard deviation 0.9" in text
    assert ImageStore.open("z.store").latents == LatentScaling(0.2, 0.3)

    options = (*TRAIN, "--channels", 4, "--class-conditional", "--num-images", 12)
    assert run(*options, "--data", "z.store", "--out", "stored") == 0
    assert run(*options, "--data", latents, "--latent-scale", 0.2, "--latent-shift", 0.3, "--out", "files") == 0
    assert _weights(tmp_path / "stored") == _weights(tmp_path / "files")
    # The same command goes on: what the store says of its scale is part of the run.
    assert run(*options[:-1], 16, "--data", "z.store", "--out", "stored") == 0

    capsys.readouterr()
    assert run("sample", "stored", "--num-images", 6, "--steps", 2) == 0
    text = capsys.readouterr().out
    assert "6 latents from" in text and "float16 [6, 4, 8, 8] in the scale of their autoencoder" in text
    drawn = np.load("stored/samples/latents-0.npy")
    assert drawn.shape == (6, 4, 8, 8) and drawn.dtype == np.float16 and np.isfinite(drawn).all()
    assert np.load("stored/samples/latents-0-labels.npy").tolist() == [0, 1] * 3
    bound = ImageStore.open("z.store").header.bound
    assert 2 < bound == np.abs(ImageStore.open("z.store").images).max()
    # Neither x0, which has a fifth of this spread, nor clipped like images; but not beyond what the latents are.
    assert 0.3 + 1 / 0.2 < np.abs(drawn).max() <= 0.31 + bound / 0.2
    # What is drawn can be imported again.
    assert run("pack", "stored/samples/latents-0.npy", "again.store", "--scale", 0.2, "--shift", 0.3) == 0
    assert ImageStore.open("again.store").labels.tolist() == [0, 1] * 3

    for out in ("grid.png", "folder"):
        assert run("sample", "stored", "--num-images", 2, "--steps", 2, "--out", out) == 2
        assert "want --out NAME.npy" in capsys.readouterr().err
    assert run("evaluate", "stored", "--data", "z.store") == 2
    assert "was trained on latents: draw some with maskdm-fast sample, decode them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--hflip", 0.5), "hflip is 0.5, want 0: a mirrored latent is not that of the mirrored image"),
        (("--preview-images", 4), "preview_images is 4, want 0: pictures of latents need their autoencoder"),
        (("--score-images", 8), "score_images is 8, want 0: pictures of latents need their autoencoder"),
        (("--channels", 3), "want 8x8x3"),
        (("--latent-scale", 1.0), "the store knows them"),
    ],
)
def test_what_latents_cannot_do(latents, run, capsys, option, message):
    assert run("pack", latents, "z.store", "--scale", 0.2) == 0
    assert run(*TRAIN, "--channels", 4, "--data", "z.store", *option, "--out", "run") == 2
    assert message in capsys.readouterr().err


def test_skip_bad(shards, tmp_path, run, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"no image")
    assert run("pack", folder, "out.store", "--image-size", 4, "--channels", 1) == 2
    assert "1 of 3 images of 'images' cannot be read" in capsys.readouterr().err
    assert run("pack", folder, "out.store", "--image-size", 4, "--channels", 1, "--skip-bad") == 0
    assert "2 images of 4x4x1 (height, width, channels), no classes, 0.0 MiB in 1 file, 1 left out" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("images",), "is no name for a store: want a file named like photos.store"),
        (("a.store",), "--image-size is missing"),
        (("a.store", "--image-size", 0), "image_size is 0"),
        (("a.store", "--image-size", 8, "--channels", 2), "channels is 2, want 1 (grey) or 3 (RGB)"),
        (("a.store", "--image-size", 8, "--shard-gib", 0), "--shard-gib is 0.0, want more than 0"),
        (("a.store", "--image-size", 8, "--scale", 2), "holds no latents"),
        (("a.store", "--image-size", 8, "--shift", 2), "--shift is 2.0, but there is no --scale"),
    ],
)
def test_errors(shards, tmp_path, run, capsys, options, message):
    assert run("pack", shards, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.store"))


def test_the_commands_of_the_page_can_be_given():
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    lines = re.findall(r"^maskdm-fast (.*)$", page.read_text(), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        command, *arguments = shlex.split(line)
        if command == "train":
            config, *_ = cli._train_options(arguments[0], arguments[1:])
            if ".store" in config.data and config.model.channels == 4:
                for _, run in config.runs():
                    assert not (run.stage.hflip or run.output.preview_images or run.output.score_images)
        else:
            cli._parse({"pack": PackOptions, "sample": SampleOptions}[command], arguments, command).check()
