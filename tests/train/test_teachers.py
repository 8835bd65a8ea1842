"""The teacher of a run: where it is looked for, the copy that stays, and what its student takes from it."""

import contextlib
import shutil
from dataclasses import replace

import pytest
import torch

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.models import UViT
from maskdm_fast.train import CheckpointError, Recipe, checkpoint, export, load_weights, train
from maskdm_fast.train.config import DiffusionConfig
from maskdm_fast.train.stages.parts import check_teacher
from maskdm_fast.train.teachers import CHECK_NAME, TEACHER_NAME, find_teacher, fit_to_teacher, keep_teacher, taught
from maskdm_fast.train.world import World
from tests.train.by_hand import teacher_of

WORLD = World(torch.device("cpu"))


@pytest.fixture
def teach(make_config, tmp_path):
    """Train a run that denoises, in the folder ``teacher``."""

    def teach(**changes) -> None:
        changes = {"diffusion": DiffusionConfig(prediction="v"), "mask": NoMask(), "num_images": 16, **changes}
        train(make_config(**changes), tmp_path / "teacher")

    return teach


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_student_begins_as_its_teacher(teach, make_student, tmp_path, which):
    teach()
    train(make_student(num_images=4, lr=1e-30, teacher_weights=which), tmp_path / "run")
    wanted = load_weights(tmp_path / "teacher", which).tensors
    assert not same(wanted, load_weights(tmp_path / "teacher", "raw" if which == "ema" else "ema").tensors)
    newest = checkpoint.newest(tmp_path / "run")
    assert all(same(newest.tensors(group), wanted) for group in ("model", "fake_model", "ema"))
    assert same(load_weights(tmp_path / "run" / TEACHER_NAME, which).tensors, wanted)


def test_the_copy_is_taken_whatever_becomes_of_the_teacher(teach, make_student, tmp_path):
    teach()
    config = make_student(num_images=8)
    train(config, tmp_path / "run")
    first = load_weights(tmp_path / "teacher").tensors
    teach(num_images=32)  # it goes on
    assert not same(load_weights(tmp_path / "teacher").tensors, first)
    found = find_teacher(config, tmp_path / "run", WORLD)
    assert same(found.tensors, first) and found.checkpoint.step == 4
    shutil.rmtree(tmp_path / "teacher")
    assert same(find_teacher(config, tmp_path / "run", WORLD).tensors, first)
    assert train(replace(config, stage=replace(config.stage, num_images=12)), tmp_path / "run").step == 3
    with pytest.raises(FileNotFoundError, match=r"nothing to start from: .*teacher \(--teacher teacher\)"):
        train(config, tmp_path / "another")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _flip, lambda path: path.unlink()], ids=["cut", "a bit", "gone"])
def test_a_damaged_copy(teach, make_student, tmp_path, damage):
    teach()
    config = make_student(num_images=8)
    train(config, tmp_path / "run")
    damage(tmp_path / "run" / TEACHER_NAME)
    with pytest.raises(CheckpointError, match=r"run/teacher\.safetensors, the copy of the teacher, is not what was"):
        train(config, tmp_path / "run")
    (tmp_path / "run" / CHECK_NAME).unlink()  # as the message says
    train(replace(config, stage=replace(config.stage, num_images=12)), tmp_path / "run")
    assert same(load_weights(tmp_path / "run" / TEACHER_NAME).tensors, load_weights(tmp_path / "teacher").tensors)


def test_a_copy_that_a_crash_left_half_made(teach, make_student, tmp_path, monkeypatch):
    """Whole, but its check is not there yet: both are written again."""
    teach()
    config, folder = make_student(), tmp_path / "run"
    folder.mkdir()
    teacher = find_teacher(config, folder, WORLD)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json_atomic", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            keep_teacher(teacher, folder)
    assert (folder / TEACHER_NAME).exists() and not (folder / CHECK_NAME).exists()
    train(config, folder)
    assert (folder / CHECK_NAME).exists()


def test_where_a_teacher_may_lie(teach, make_student, tmp_path, monkeypatch):
    """Beside the run folder, in the working directory, as a checkpoint folder or an exported file."""
    teach()
    wanted = load_weights(tmp_path / "teacher").tensors
    export(tmp_path / "teacher", tmp_path / "teacher.safetensors")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    newest = checkpoint.newest(tmp_path / "teacher").path
    for name in ("teacher", "teacher.safetensors", str(newest), newest.relative_to(tmp_path)):
        for folder in (tmp_path / "run", tmp_path / "deep" / "run"):
            assert same(find_teacher(make_student(teacher=str(name)), folder, WORLD).tensors, wanted)


def official_names(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a network with patches of 2 as the code of U-ViT has them, but for those of labels."""
    official = {
        "patch_embed.proj.weight": ours["patch_embed.weight"].view(-1, 2, 2, 3).permute(0, 3, 1, 2).contiguous(),
        "patch_embed.proj.bias": ours["patch_embed.bias"],
        "pos_embed": ours["positions"][None],
    }
    for name, tensor in ours.items():
        if name.endswith("skip.weight_x"):
            joined = torch.cat([tensor, ours[name.replace("weight_x", "weight_skip")]], dim=1)
            official[name.replace("skip.weight_x", "skip_linear.weight")] = joined
        elif not name.startswith(("patch_embed.", "positions", "label_", "uncond_")) and not name.endswith("_skip"):
            for old, new in (("attention.", "attn."), ("skip.", "skip_linear.")):
                name = name.replace(old, new)
            official[f"decoder_pred.{name[5:]}" if name.startswith("head.") else name] = tensor
    return official


def test_weights_of_the_official_code_teach(make_student, tmp_path):
    config = make_student(teacher="nnet_ema.pth", num_images=4, lr=1e-30)
    ours = UViT(config.model, seed=3).state_dict()
    torch.save(official_names(ours), tmp_path / "nnet_ema.pth")
    train(config, tmp_path / "run")
    found = load_weights(tmp_path / "run", "raw").tensors
    assert found.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-29)


def test_an_official_teacher_of_another_width_keeps_its_heads(make_student, tmp_path):
    """The heads of the preset's width were taken for those of every width, which no shape contradicts."""
    config = make_student(teacher="nnet_ema.pth")
    wider = replace(config.model, dim=192, num_heads=3)
    torch.save(official_names(UViT(wider, seed=3).state_dict()), tmp_path / "nnet_ema.pth")
    assert config.model.num_heads == 2
    assert find_teacher(config, tmp_path / "run", WORLD).config.model == wider


def test_official_teachers_predict_the_noise(make_student, tmp_path, capsys):
    """They were taken to predict what the run does. Their schedule is the run's, which is said."""
    config = make_student(teacher="nnet_ema.pth", diffusion=DiffusionConfig("vp", "v"), num_images=4)
    torch.save(official_names(UViT(config.model, seed=3).state_dict()), tmp_path / "nnet_ema.pth")
    for _ in range(2):
        teacher = find_teacher(config, tmp_path / "run", WORLD)
        fitted = fit_to_teacher(config, teacher, WORLD)
        assert (fitted.diffusion.schedule, fitted.diffusion.prediction) == ("vp", "eps")
        said = capsys.readouterr().err
        assert "diffusion.prediction v -> eps" in said
        # Of the copy it is known.
        assert ("a file of U-ViT, which does not name its noise schedule: taken for vp; " in said) == (
            teacher.checkpoint.path.name == "nnet_ema.pth"
        )
        train(config, tmp_path / "run")
        capsys.readouterr()
    assert teacher.checkpoint.path.name == TEACHER_NAME


@pytest.mark.parametrize(("rows", "fits"), [(3, False), (4, True)])
def test_official_weights_with_an_unconditional_embedding_can_be_guided(make_student, tmp_path, rows, fits):
    """One row more than classes."""
    options = {"teacher": "nnet.pth", "teacher_weights": "raw", "guidance": "teacher", "guidance_scale": 2.0}
    config = make_student(**options)
    config = replace(config, model=replace(config.model, num_classes=3))
    ours = UViT(config.model, seed=3).state_dict()
    torch.save({**official_names(ours), "label_emb.weight": torch.randn(rows, config.model.dim)}, tmp_path / "nnet.pth")
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="was not trained both with and without"):
        assert find_teacher(config, tmp_path / "run", WORLD).config.model == config.model


def test_a_student_is_no_teacher(teach, make_student, tmp_path):
    teach()
    train(make_student(num_images=4), tmp_path / "student")
    message = r"the teacher .*student.*: it comes from score-distillation: it makes images in its own steps"
    with pytest.raises(ValueError, match=message):
        train(make_student(teacher="student"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_takes_network_schedule_and_prediction(teach, make_student, tmp_path, capsys):
    teach(diffusion=DiffusionConfig("linear", "x0"), model=replace(make_student().model, dim=24, depth=5))
    config = make_student(diffusion=DiffusionConfig("cosine", "v", loss_weight="min-snr"))
    teacher = find_teacher(config, tmp_path / "run", WORLD)
    fitted = fit_to_teacher(config, teacher, WORLD)
    assert fitted.model == teacher.config.model and fitted.model.dim == 24
    assert (fitted.diffusion.schedule, fitted.diffusion.prediction) == ("linear", "x0")
    assert fitted.diffusion.loss_weight == "min-snr"
    words = "model.dim 16 -> 24, model.depth 3 -> 5, diffusion.schedule cosine -> linear, diffusion.prediction v -> x0"
    assert f"as the teacher {teacher.checkpoint.path}: {words}\n" in capsys.readouterr().err
    train(replace(config, stage=replace(config.stage, num_images=4)), tmp_path / "run")
    assert load_weights(tmp_path / "run").config.model.dim == 24
    capsys.readouterr()
    fit_to_teacher(fitted, teacher, WORLD)
    assert capsys.readouterr().err == ""


def test_an_estimate_counts_the_network_of_the_teacher(teach, make_config, make_student, tmp_path, capsys):
    """Of a run, and of a recipe whose rounds teach each other."""
    base = make_student()
    student = replace(base, model=replace(base.model, dim=32))
    shared = {name: getattr(student, name) for name in ("data", "model", "diffusion", "machine", "output")}
    recipe = Recipe(stages=(("one", student.stage), ("two", student.stage)), **shared)
    for config, folder in ((student, tmp_path / "run"), (recipe, tmp_path)):
        assert taught(config, folder) == config
        assert "counted is the network of the preset: nothing to start from" in capsys.readouterr().err
    teach()
    assert taught(student, tmp_path / "run").model == base.model
    found = taught(replace(recipe, stages=(("one", replace(student.stage, teacher="../teacher")),)), tmp_path / "run")
    assert found.model == base.model and found.runs()[0][1].model == base.model
    assert capsys.readouterr().err.count("model.dim 32 -> 16") == 2
    assert taught(make_config(), tmp_path) == make_config()


def test_a_student_takes_the_classes(make_config, make_student, image_folder, tmp_path):
    for number, path in enumerate(sorted(image_folder.iterdir())):
        (tmp_path / "images" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "images" / str(number % 3))
    data = {"data": str(tmp_path / "images"), "diffusion": DiffusionConfig(prediction="v")}
    train(
        make_config(class_conditional=True, mask=NoMask(), num_images=8, label_drop=0.1, **data), tmp_path / "teacher"
    )
    guided = {"guidance": "lsg", "guidance_scale": 2.0}
    for name, more in (("run", data), ("without", {"data": "none"})):
        # Whether there are classes is known when the teacher is.
        config = make_student(class_conditional=True, num_images=8, **guided, **more)
        train(config, tmp_path / name)
        assert load_weights(tmp_path / name).config.model.num_classes == 3
        assert load_weights(tmp_path / name).class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="num_classes is 3, but the data set has 0 classes"):
        train(make_student(), tmp_path / "no-classes")
    train(make_config(mask=NoMask(), num_images=8, **data), tmp_path / "unconditional")
    message = r"another network than its teacher .*unconditional.*: num_classes 0 -> 3"
    with pytest.raises(ValueError, match=message):
        train(make_student(teacher="unconditional", class_conditional=True, **data), tmp_path / "conditional")


def test_classes_of_another_name_than_the_teachers(make_config, make_student, image_folder, tmp_path):
    """Label 0 would mean one class to the teacher and another in the data set."""
    for number, path in enumerate(sorted(image_folder.iterdir())):
        for names in (("ant", "cat"), ("cat", "dog")):
            target = tmp_path / "-".join(names) / names[number % 2]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shared = {"class_conditional": True, "diffusion": DiffusionConfig(prediction="v"), "num_images": 4}
    train(make_config(mask=NoMask(), data=str(tmp_path / "ant-cat"), **shared), tmp_path / "teacher")
    words = (
        r"the teacher .*step-00000001 knows the classes ant, cat, but the data set .*cat-dog' has cat, dog: want the"
    )
    with pytest.raises(ValueError, match=words):
        train(make_student(data=str(tmp_path / "cat-dog"), **shared), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_of_another_scale(make_student):
    config = replace(make_student(), latent_scale=0.18, latent_shift=0.1)
    teacher = teacher_of(config)
    check_teacher(config, teacher)
    words = r"knows .*scale=0\.18, shift=0\.1.*but the data set has .*scale=0\.36, shift=0\.1"
    with pytest.raises(ValueError, match=words):
        check_teacher(replace(config, latent_scale=0.36), teacher)
