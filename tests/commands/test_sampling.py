import fcntl
import json
import typing

import numpy as np
import pytest
from PIL import Image

from maskdm_fast.commands.drawing import DrawOptions
from maskdm_fast.commands.labelled_folder import LabelledFolder, folder_names
from maskdm_fast.data import folder_source, open_dataset
from maskdm_fast.diffusion import SAMPLERS

STEPS = ("--steps", 2)


def _files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def _lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def _pixels(path):
    return np.asarray(Image.open(path), int)


def test_every_sampler_is_offered():
    assert typing.get_args(typing.get_type_hints(DrawOptions)["sampler"]) == SAMPLERS


def test_per_class_folder_can_be_trained_on_and_says_how(conditional_run, tmp_path, run, capsys):
    out = tmp_path / "drawn"
    guidance = ("--guidance", 1.5, "--guidance-interval", 0.1, 10)
    assert run("sample", conditional_run, "--per-class", 3, *STEPS, *guidance, "--seed", 4, "--out", out) == 0
    assert "9 images from" in capsys.readouterr().out
    names = ("ants", "bees", "cats & dogs")
    assert _files(out) == [f"{name}/4-{number:06d}.png" for name in names for number in range(3)]
    lines = _lines(out)
    assert [line["file"] for line in lines] == _files(out)
    assert [(line["label"], line["class_name"]) for line in lines[::3]] == list(enumerate(names))
    assert len({line["slot"] for line in lines}) == 9
    first = lines[0]
    assert (first["sampler"], first["steps"], first["seed"], first["weights"]) == ("ddim", 2, 4, "ema")
    assert (first["guidance"], first["guidance_interval"]) == (1.5, [0.1, 10.0])
    assert first["checkpoint"].endswith("step-00000002") and len(first["weights_sha256"]) == 64

    source = folder_source(out)
    assert source.class_names == names and len(source.files) == 9
    assert open_dataset(out, 8, cache_dir=tmp_path / "cache").labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    options = ("--class-conditional", "--image-size", 8, "--patch-size", 2, "--num-images", 32, "--preview-images", 0)
    assert run("train", "smoke-pretrain", "--data", out, *options, "--out", "again") == 0


def test_an_image_does_not_depend_on_what_else_is_drawn(conditional_run, tmp_path, run):
    draw = ("sample", conditional_run, *STEPS)
    assert run(*draw, "--per-class", 3, "--out", "all") == 0
    assert run(*draw, "--per-class", 2, "--classes", "cats & dogs", "0", "--batch-size", 1, "--out", "some") == 0
    assert _files(tmp_path / "some") == [f"{name}/0-00000{n}.png" for name in ("ants", "cats & dogs") for n in range(2)]
    for file in _files(tmp_path / "some"):
        assert np.abs(_pixels(tmp_path / "all" / file) - _pixels(tmp_path / "some" / file)).max() <= 1


def test_goes_on_where_it_was_stopped(conditional_run, tmp_path, run, capsys):
    out = tmp_path / "drawn"
    draw = ("sample", conditional_run, *STEPS, "--out", out, "--per-class")
    assert run(*draw, 4) == 0
    before = {file: ((out / file).read_bytes(), (out / file).stat().st_mtime_ns) for file in _files(out)}
    (out / "bees" / "0-000002.png").unlink()
    (out / "bees" / ".0-000002.png.tmp").write_bytes(b"half an im")
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"file": "bees/0-0000')
    capsys.readouterr()
    assert run(*draw, 5) == 0
    text = capsys.readouterr().out
    assert "11 of 15 images are there already" in text and "4 images from" in text
    after = {file: ((out / file).read_bytes(), (out / file).stat().st_mtime_ns) for file in _files(out)}
    assert len(after) == len(_lines(out)) == 15
    assert [file for file in before if after[file][1] != before[file][1]] == ["bees/0-000002.png"]
    assert np.abs(_pixels(out / "bees/0-000002.png") - _decode(before["bees/0-000002.png"][0])).max() <= 1
    assert not list(out.rglob("*.tmp"))
    assert run(*draw, 5) == 0
    assert "0 images from" in capsys.readouterr().out


def _decode(content):
    import io

    return np.asarray(Image.open(io.BytesIO(content)), int)


def test_images_drawn_otherwise_are_not_mixed_nor_overwritten(conditional_run, tmp_path, run, capsys):
    out = tmp_path / "drawn"
    draw = ("sample", conditional_run, "--per-class", 1, "--out", out)
    assert run(*draw, "--steps", 2) == 0
    before = [(out / file).read_bytes() for file in _files(out)]
    assert run(*draw, "--steps", 3) == 2
    assert "ants/0-000000.png: steps 2 -> 3" in capsys.readouterr().err
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[1:]))
    assert run(*draw, "--steps", 2) == 2
    assert "ants/0-000000.png is not in manifest.jsonl" in capsys.readouterr().err
    assert [(out / file).read_bytes() for file in _files(out)] == before
    assert run(*draw, "--steps", 2, "--seed", 1) == 0 and len(_files(out)) == 6


@pytest.mark.parametrize("name", ["photo.JPG", "trip/photo.webp"])
def test_a_folder_of_other_images_stays_as_it_is(grey_run, tmp_path, run, capsys, name):
    """Drawn images among the photos that a run was trained on would be trained on, too."""
    photo = tmp_path / "photos" / name
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"a photo")
    assert run("sample", grey_run, *STEPS, "--num-images", 1, "--out", "photos") == 2
    message = f"photos holds images that were not drawn, such as photos/{name}: choose another --out"
    assert message in capsys.readouterr().err
    assert [path for path in (tmp_path / "photos").rglob("*") if path.is_file()] == [photo]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("no image")
    assert run("sample", grey_run, *STEPS, "--num-images", 1, "--out", "notes") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance", 2), "guidance needs labels"),
        (("--steps", 2000), "1000"),
        (("--eta", 2), "eta is 2.0"),
    ],
)
def test_a_drawing_that_fails_leaves_no_folder(grey_run, tmp_path, run, capsys, options, message):
    assert run("sample", grey_run, *options, "--num-images", 1, "--out", "drawn") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_a_folder_is_no_file(grey_run, tmp_path, run, capsys, monkeypatch):
    (tmp_path / "grid.png").mkdir()
    monkeypatch.setattr("maskdm_fast.commands.sampling.draw", lambda *_, **__: pytest.fail("drawn"))
    assert run("sample", grey_run, *STEPS, "--out", "grid.png") == 2
    assert "grid.png is a folder: want the name of a file" in capsys.readouterr().err


def test_a_file_is_no_folder(grey_run, tmp_path, run, capsys):
    (tmp_path / "photos.store").write_bytes(b"")
    assert run("sample", grey_run, *STEPS, "--out", "photos.store") == 2
    assert "photos.store is a file: want a folder, or a name like photos.png for a grid" in capsys.readouterr().err


def test_the_line_is_there_before_the_image(conditional_run, tmp_path, run, monkeypatch):
    """A crash while the second image is written leaves its line without a file, never a file without its line."""
    out, written = tmp_path / "drawn", []

    def encode(image):
        if len(written) == 1:
            raise RuntimeError("crash")
        written.append(1)
        return b"png"

    monkeypatch.setattr("maskdm_fast.eval.grid.png_bytes", encode)
    assert run("sample", conditional_run, *STEPS, "--per-class", 2, "--out", out) == 2
    assert _files(out) == ["ants/0-000000.png"]
    assert [line["file"] for line in _lines(out)] == ["ants/0-000000.png", "ants/0-000001.png"]


def test_two_processes_do_not_draw_into_one_folder(tmp_path):
    with LabelledFolder.open(tmp_path / "drawn"), open(tmp_path / "drawn" / ".lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (
            pytest.raises(RuntimeError, match="another process is drawing into"),
            LabelledFolder.open(tmp_path / "drawn"),
        ):
            pass


def test_grids_and_labels(conditional_run, tmp_path, run):
    draw = ("sample", conditional_run, *STEPS)
    assert run(*draw, "--per-class", 4, "--out", "rows.png") == 0
    assert Image.open("rows.png").size == (4 * 10 + 2, 3 * 10 + 2)
    assert run(*draw, "--labels", "bees", "2", "bees", "--out", "labels") == 0
    assert _files(tmp_path / "labels") == ["bees/0-000000.png", "bees/0-000002.png", "cats & dogs/0-000001.png"]
    assert run(*draw, "--num-images", 5, "--classes", "2", "bees", "--out", "some") == 0
    assert [line["label"] for line in _lines(tmp_path / "some")] == [2, 1, 2, 1, 2]


def test_a_grey_run_without_classes_draws_grey_files_side_by_side(grey_run, tmp_path, run, capsys):
    assert run("sample", grey_run, *STEPS, "--num-images", 3, "--out", "flat") == 0
    assert _files(tmp_path / "flat") == ["0-000000.png", "0-000001.png", "0-000002.png"]
    assert Image.open("flat/0-000000.png").mode == "L"
    assert _lines(tmp_path / "flat")[0]["class_name"] is None
    assert run("sample", grey_run, *STEPS, "--per-class", 3, "--out", "flat") == 2
    assert "was trained without classes, so --per-class means nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--per-class", 0), "--per-class is 0, want at least 1"),
        (("--per-class", 2_000_000), "--per-class is 2000000, want at most 1048576"),
        (("--classes", "bee"), "no class 'bee'; the nearest is 'bees', and numbers go from 0 to 2"),
        (("--labels", "0", "3"), "no class '3'"),
        (("--labels", "0", "--per-class", 2), "leave out --per-class and --classes"),
        (("--labels",), "--labels names no class"),
        (("--classes",), "--classes names no class"),
        (("--batch-size", 0), "--batch-size is 0, want at least 1"),
        (("--steps", 0), "--steps is 0, want at least 1"),
        (("--guidance", -2), "--guidance is -2.0, want at least 0"),
        (("--guidance", "nan"), "--guidance is nan, want a finite number"),
        (("--guidance-interval", 0.1, "inf"), "--guidance-interval is inf, want a finite number"),
        (("--value-guidance", "inf"), "--value-guidance is inf, want a finite number"),
        (("--eta", "nan"), "--eta is nan, want a finite number"),
    ],
)
def test_errors(conditional_run, run, capsys, options, message):
    assert run("sample", conditional_run, *options, "--out", "drawn") == 2
    assert message in capsys.readouterr().err


def test_folder_names_hold_on_any_file_system():
    names = folder_names(["a/b", "a\\b", ".hidden", "A_B", "", "Food & Drink"])
    assert names == ["a_b", "a_b~2", "hidden", "A_B~3", "_", "Food & Drink"]


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.png"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"manifest.jsonl, line 2: not a line"), LabelledFolder.open(tmp_path):
        pass
