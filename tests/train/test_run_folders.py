"""What a run folder may hold, and when it counts as begun."""

import json
import shutil
from dataclasses import replace

import pytest

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.train import Recipe, TrainingDivergedError, checkpoint, load_weights, read_metrics, train, train_recipe
from maskdm_fast.train.config import DiffusionConfig
from maskdm_fast.train.teachers import TEACHER_NAME


@pytest.fixture
def recipe(make_config):
    base = make_config(num_images=4)
    shared = {name: getattr(base, name) for name in ("data", "model", "machine", "output")}
    return Recipe(stages=(("pretrain", base.stage), ("finetune", replace(base.stage, mask=NoMask()))), **shared)


def test_a_recipe_and_a_run_do_not_share_a_folder(make_config, recipe, tmp_path, monkeypatch):
    """Its name would mean the weights of either, and was taken for those of the run."""
    train(make_config(num_images=4), tmp_path / "run")
    with pytest.raises(ValueError, match="run holds a run, so no stages of a recipe; choose another"):
        train_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "1-pretrain").exists()
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run, so no stages"):
        train(make_config(), "1-pretrain")
    train_recipe(recipe, tmp_path / "recipe")
    with pytest.raises(ValueError, match=r"recipe holds stages of a recipe \(1-pretrain, 2-finetune\); choose another"):
        train(make_config(), tmp_path / "recipe")
    assert load_weights(tmp_path / "recipe").checkpoint.path.parent.parent.name == "2-finetune"
    train(make_config(num_images=4, init_from="2-finetune"), tmp_path / "recipe" / "3-more")
    assert load_weights(tmp_path / "recipe").checkpoint.path.parent.parent.name == "3-more"


def longer(recipe, number, num_images):
    stages = [*recipe.stages]
    stages[number] = (stages[number][0], replace(stages[number][1], num_images=num_images))
    return replace(recipe, stages=tuple(stages))


def test_a_stage_does_not_go_on_under_the_next_one(recipe, tmp_path):
    """Which began from what it was; the last one may."""
    train_recipe(recipe, tmp_path)
    with pytest.raises(ValueError, match=r"1-pretrain would go on from step 1, but 2-finetune has begun .*; remove"):
        train_recipe(longer(recipe, 0, 8), tmp_path)
    assert checkpoint.newest(tmp_path / "1-pretrain").step == 1
    train_recipe(longer(recipe, 1, 8), tmp_path)
    assert checkpoint.newest(tmp_path / "2-finetune").step == 2
    shutil.rmtree(tmp_path / "2-finetune")
    train_recipe(longer(recipe, 0, 8), tmp_path)
    assert [checkpoint.newest(tmp_path / name).step for name in ("1-pretrain", "2-finetune")] == [2, 1]


def test_no_stage_is_trained_where_a_later_one_cannot_be(recipe, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'maskdm_fast[deepspeed]')")
    (first, second), machine = recipe.stages, replace(recipe.machine, engine="zero1")
    stages = (first, (second[0], replace(second[1], optimizer="lamb")))
    with pytest.raises(ValueError, match="optimizer lamb needs the norms of whole tensors"):
        train_recipe(replace(recipe, stages=stages, machine=machine), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", '{"model": 5}', "[]"])
def test_a_configuration_that_was_cut_is_named(make_config, tmp_path, text):
    train(make_config(num_images=4), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is no configuration of a run .*; restore it"):
        train(make_config(num_images=8), tmp_path)


def test_a_start_that_failed_does_not_take_the_folder(make_config, tmp_path):
    """The command with what was wrong put right begins as if there had been none before it."""
    with pytest.raises(FileNotFoundError, match="nothing to start from"):
        train(make_config(init_from="nowhere"), tmp_path / "run")
    changes = {"lr": 1e18, "warmup_images": 0, "max_grad_norm": None, "log_images": 4}
    with pytest.raises(TrainingDivergedError):
        train(make_config(**changes, num_images=400, checkpoint_images=4000), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) > 1
    config = make_config(num_images=8, log_images=4)
    train(config, tmp_path / "run")
    train(config, tmp_path / "fresh")
    files = [checkpoint.newest(tmp_path / name).path / "model.safetensors" for name in ("run", "fresh")]
    assert files[0].read_bytes() == files[1].read_bytes()
    header, *logs = read_metrics(tmp_path / "run")
    assert header["config"] == config.to_dict() == json.loads((tmp_path / "run" / "config.json").read_text())
    assert [record["step"] for record in logs] == [1, 2]


def test_nor_does_its_teacher_stay(make_config, make_student, tmp_path, monkeypatch):
    for number, name in enumerate(("wrong", "right")):
        diffusion = DiffusionConfig(prediction="v")
        train(make_config(num_images=4, mask=NoMask(), diffusion=diffusion, seed=number), tmp_path / name)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("maskdm_fast.train.runs.build_stage", fail)
        with pytest.raises(KeyboardInterrupt):
            train(make_student(teacher="wrong"), tmp_path / "run")
    assert (tmp_path / "run" / TEACHER_NAME).exists()
    train(make_student(teacher="right", num_images=4), tmp_path / "run")
    kept, right = (load_weights(path).tensors for path in (tmp_path / "run" / TEACHER_NAME, tmp_path / "right"))
    assert all(kept[name].equal(tensor) for name, tensor in right.items())
