import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast.commands import evaluation
from maskdm_fast.commands.image_sets import Side
from maskdm_fast.data import find_source, open_dataset, pack
from maskdm_fast.eval import compare, load_features

STEPS = ("--steps", 2)


def _record(path="evaluation.json"):
    with open(path) as file:
        return json.load(file)


@pytest.fixture
def folders(real, tmp_path):
    """The real images in two halves, "a" and "b", and "dark": those of "a" at half their brightness."""
    for number, path in enumerate(sorted(real.rglob("*.png"))):
        for name in ("a", "dark") if number % 2 else ("b",):
            target = tmp_path / name / path.relative_to(real)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            if name == "dark":
                Image.fromarray(np.asarray(Image.open(path)) // 2).save(target)
    return tmp_path


def test_several_sets_of_any_kind_in_one_table(folders, real, conditional_run, run, capsys):
    pack(find_source(folders / "a"), folders / "a.store", 8)
    sets = (conditional_run, "a", "a.store", "dark")
    assert run("evaluate", *sets, "--data", real, *STEPS, "--num-images", 20) == 0
    text = capsys.readouterr().out
    for words in ("FD-mean", "precision", "floor", "n = 20 generated against 44 real; floor: 20 real against 24 other"):
        assert words in text
    record = _record()
    scored = record["sets"]
    assert [entry["name"] for entry in scored] == [str(name) for name in sets]
    assert {entry["scores"]["num_generated"] for entry in scored} == {20}
    assert len({(entry["scores"]["fd_floor"], entry["scores"]["kid_floor"]) for entry in scored}) == 1
    assert scored[0]["checkpoint"].endswith("step-00000002") and scored[1]["checkpoint"] is None
    assert {**scored[1], "name": ""} == {**scored[2], "name": ""}
    assert scored[3]["scores"]["fd"] > 5 * scored[1]["scores"]["fd"]
    assert scored[3]["manifold"]["precision"] < scored[1]["manifold"]["precision"]
    # "a" is part of the reference, so every image is a copy.
    assert scored[1]["copying"]["near_copies"] == scored[1]["copying"]["closer"] == 1.0
    assert record["reference"] == {"name": str(real), "num_images": 44, "key": record["reference"]["key"]}
    assert record["versions"]["torch"] and record["machine"]["cpu"] and "commit" in record
    assert len(record["pictures"]) == 4 and all((folders / name).exists() for name in record["pictures"])


def test_numbers_are_cut_to_the_smallest_set(folders, run):
    assert run("evaluate", "a", "a/ants", "--data", "b") == 0
    record = _record()
    assert {entry["scores"]["num_generated"] for entry in record["sets"]} == {12}
    assert record["sets"][0]["num_manifold"] == 12
    assert run("evaluate", "a", "--data", "b", "--num-reference", 10, "--neighbours", 0) == 0
    assert _record()["sets"][0]["scores"]["num_reference"] == 10
    assert not list(folders.glob("neighbours.png"))


def test_the_scores_are_those_of_the_library(folders, run):
    assert run("evaluate", "dark", "--data", "b", "--image-size", 8, "--seed", 3) == 0
    images = [open_dataset(name, 8, cache_dir="cache").images for name in ("dark", "b")]
    want = compare(*images, evaluation.load_features("lite0"), seed=3)
    got = _record()["sets"][0]["scores"]
    assert got["num_generated"] == 22 and got["fd"] == pytest.approx(want.fd) and got["kid"] == pytest.approx(want.kid)
    assert got["fd_floor"] == pytest.approx(want.fd_floor)


def test_classes_are_matched_by_name(folders, run, capsys):
    (folders / "dark" / "bees").rename(folders / "dark" / "zebras")
    assert run("evaluate", "a", "--data", "b") == 0
    classes = {entry["name"]: entry for entry in _record()["sets"][0]["classes"]}
    assert [entry["num_generated"] for entry in classes.values()] == [12, 6, 4]
    assert [entry["num_reference"] for entry in classes.values()] == [12, 6, 4]
    assert all(entry["agreement"] > 0.7 for entry in classes.values())
    assert "by class" in capsys.readouterr().out
    assert run("evaluate", "dark", "--data", "b") == 0
    assert _record()["sets"][0]["classes"] is None
    (folders / "b" / "ants").rename(folders / "b" / "yaks")
    (folders / "a" / "ants").rename(folders / "a" / "yaks")  # now last in the order of names
    assert run("evaluate", "a", "--data", "b") == 0
    renamed = {entry["name"]: entry for entry in _record()["sets"][0]["classes"]}
    assert renamed["yaks"]["agreement"] == classes["ants"]["agreement"]


def test_a_run_with_classes_draws_them_in_the_proportions_of_the_data(conditional_run, run):
    assert run("evaluate", conditional_run, *STEPS, "--num-images", 44, "--out", "scores.json") == 0
    classes = _record("scores.json")["sets"][0]["classes"]
    assert {entry["name"]: entry["num_generated"] for entry in classes} == {"ants": 24, "bees": 12, "cats & dogs": 8}


def test_runs_on_either_side_differ_in_their_noise(conditional_run, run):
    """A run against itself: the same noise on both sides would make every image a copy."""
    assert run("evaluate", conditional_run, "--data", conditional_run, *STEPS, "--num-images", 9) == 0
    record = _record(conditional_run / "evaluation.json")
    assert record["reference"]["num_images"] == 9 and record["reference"]["key"] is None
    assert record["sets"][0]["copying"]["near_copies"] < 1


def test_grey_runs_are_compared_with_grey_images(grey_run, real, run, monkeypatch):
    seen = []
    read = evaluation.read
    monkeypatch.setattr(
        evaluation, "read", lambda store, *rest, **more: seen.append(store) or read(store, *rest, **more)
    )
    assert run("evaluate", grey_run, real, *STEPS, "--num-images", 8, "--out", "scores.json") == 0
    assert [store.channels for store in seen] == [1, 1]
    assert all(entry["classes"] is None for entry in _record("scores.json")["sets"][:1])


def test_folders_of_images_are_left_as_they_are(folders, run):
    before = sorted(folders.joinpath("a").rglob("*"))
    assert run("evaluate", "a", "--data", "b") == 0
    assert sorted(folders.joinpath("a").rglob("*")) == before and (folders / "evaluation.json").exists()


def test_neighbours_are_beside_their_samples(folders, run):
    assert run("evaluate", "a", "--data", "a", "--image-size", 8, "--neighbours", 3) == 0
    picture = np.asarray(Image.open("neighbours.png"))
    assert picture.shape == (3 * 10 + 2, 5 * 10 + 2, 3)
    for row in range(3):
        top = 2 + 10 * row
        assert np.array_equal(picture[top : top + 8, 2:10], picture[top : top + 8, 12:20])  # its nearest is itself


def test_too_few_images_for_precision(folders, run, capsys):
    assert run("evaluate", "a", "--data", "b", "--num-images", 5) == 0
    assert _record()["sets"][0]["manifold"] is None
    assert " - " in capsys.readouterr().out


def test_torch_generators_are_left_alone(folders, run):
    state = torch.get_rng_state()
    assert run("evaluate", "a", "--data", "b") == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "--data must say which real images"),
        (("nowhere", "--data", "b"), "there is no run, folder or file 'nowhere'"),
        (("nowhere",), "there is no run, folder or file 'nowhere'"),
        (("a", "--data", "nowhere"), "there is no run, folder or file 'nowhere'"),
        (("RUN", "--out", "a"), "a is a folder: want the name of a file"),
        (("RUN", "--out", "a.store/scores.json"), "a.store is a file"),
        (("RUN", "--features", "nope.pt"), "no file 'nope.pt'"),
        (("a", "--data", "b", "--num-images", 1), "--num-images is 1, want at least 2"),
        (("a", "--data", "b", "--num-reference", 3), "--num-reference is 3, want at least 4"),
        (("RUN", "--image-size", 16), "--image-size is 16, but RUN has images of 8 px in 3 channels"),
        (("RUN", "GREY"), "RUN has images of 8 px in 3 channels, GREY of 8 px in grey: score them apart"),
    ],
)
def test_errors(folders, conditional_run, grey_run, run, capsys, monkeypatch, arguments, message):
    """Each is known before an image is read or drawn."""
    monkeypatch.setattr(Side, "open", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr(evaluation, "drawn", lambda *_, **__: pytest.fail("drawn"))
    if "nope.pt" in arguments:
        monkeypatch.setattr(evaluation, "load_features", load_features)
    (folders / "a.store").write_bytes(b"")
    before = sorted(folders.rglob("*"))
    names = {"RUN": str(conditional_run), "GREY": str(grey_run)}
    assert run("evaluate", *(names.get(argument, argument) for argument in arguments)) == 2
    for short, name in names.items():
        message = message.replace(short, name)
    assert message in capsys.readouterr().err
    assert sorted(folders.rglob("*")) == before


def test_a_failed_evaluation_makes_no_folders(folders, run, monkeypatch):
    monkeypatch.setattr(evaluation, "set_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("evaluate", "a", "--data", "b", "--out", "misspelt/scores.json")
    assert not (folders / "misspelt").exists()


def test_what_a_run_left_out_is_left_out(folders, run, capsys):
    (folders / "a" / "ants" / "bad.png").write_bytes(b"no image")
    options = ("--image-size", 8, "--patch-size", 2, "--num-images", 16, "--preview-images", 0, "--out", "run")
    assert run("train", "smoke-pretrain", "--data", "a", "--skip-bad", *options) == 0
    assert run("evaluate", "run", "--num-images", 8, *STEPS) == 0
    assert _record("run/evaluation.json")["reference"]["num_images"] == 22
    capsys.readouterr()
    assert run("evaluate", "dark", "--data", "a") == 2
    assert "1 of 23 images of 'a' cannot be read" in capsys.readouterr().err
    shutil.rmtree(folders / "a")
    assert run("evaluate", "run") == 2
    assert "there is no run, folder or file 'a', which the run was trained on: --data" in capsys.readouterr().err


def test_an_exported_file_takes_the_place_of_its_run(grey_run, real, folders, run):
    assert run("export", grey_run, "net.safetensors") == 0
    assert run("evaluate", "net.safetensors", *STEPS, "--num-images", 8) == 0
    assert _record("evaluation.json")["sets"][0]["checkpoint"] == "net.safetensors"
    assert run("sample", "net.safetensors", *STEPS, "--num-images", 1) == 0
    assert (folders / "grid-0.png").exists()


def test_runs_of_different_data_want_a_reference(conditional_run, folders, run, capsys):
    options = ("--image-size", 8, "--patch-size", 2, "--num-images", 16, "--preview-images", 0, "--out", "other")
    assert run("train", "smoke-pretrain", "--data", "a", *options) == 0
    assert run("evaluate", conditional_run, "other") == 2
    assert "--data must say which to compare with" in capsys.readouterr().err
