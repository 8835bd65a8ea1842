"""Students of distillation by regression: what they teach the next ones, and how they are sampled."""

import dataclasses
import functools
from dataclasses import replace

import pytest
import torch

from maskdm_fast import distill
from maskdm_fast.diffusion import Denoiser, sample
from maskdm_fast.models import UViT
from maskdm_fast.train import load_weights, train_recipe
from maskdm_fast.train.config import Recipe, RegressionConfig, RunConfig
from maskdm_fast.train.generation import generate
from maskdm_fast.train.regression_config import progressive_stages
from maskdm_fast.train.stages import build_stage
from maskdm_fast.train.stages.parts import evaluation_flops
from tests.train.regression_toys import CASES, WORLD, batch_of, counted, make_run, student_of, train


@pytest.fixture
def make(make_config):
    return functools.partial(make_run, make_config)


def test_a_student_that_is_told_teaches_the_next(make, monkeypatch):
    """v of eps with strengths, then 4 steps, then 2: each round has half the steps and the same input."""
    config, teacher = make(**CASES["guided, v of eps"])
    stage = build_stage(config, WORLD, None, teacher)
    train(stage, config)
    for num_steps in (4, 2):
        teacher = student_of(config, stage)
        options = {"method": "progressive", "num_steps": num_steps, "strengths": (1.0, 2.0), "predicts": None}
        config = replace(config, stage=replace(config.stage, **options))
        stage = build_stage(config, WORLD, None, teacher)
        assert all(torch.equal(stage.pieces()["model"][name], tensor) for name, tensor in teacher.tensors.items())
        schedule, pair = config.diffusion.noise_schedule(config.model), []
        for _ in range(2):
            network = distill.GuidedNetwork(UViT(config.model))
            network.load_state_dict(teacher.tensors)
            pair.append(Denoiser(network, schedule, "v"))
        method = distill.ProgressiveDistillation(
            patch_size=2, num_steps=num_steps, strengths=(1.0, 2.0), told_teacher=True
        )
        batch = batch_of(config, 0)
        wanted = method(*pair, batch.images, batch.labels, seed=config.seed, step=0, slots=batch.slots)
        with counted(monkeypatch) as seen:
            (row,) = train(stage, config, 0, 1)
        torch.testing.assert_close(row["loss"], wanted["loss"].detach(), rtol=1e-5, atol=0.0)
        assert sum(seen) == 5 * 4
        assert stage.flops_per_image(0) == 5 * evaluation_flops(config)
    assert stage.preview(3).shape == (3, 8, 8, 3)


def trained(make, **changes) -> tuple[RunConfig, dict]:
    config, teacher = make(**changes)
    stage = build_stage(config, WORLD, None, teacher)
    train(stage, config)
    return config, {name: tensor.clone() for name, tensor in stage.pieces()["model"].items()}


def drawn(config: RunConfig) -> dict:
    names = ("image_size", "channels", "patch_size")
    common = {"num_images": 3, "seed": 4, "batch_size": 2, **{name: getattr(config.model, name) for name in names}}
    return common | ({"labels": torch.arange(3)} if config.model.num_classes else {})


def test_a_guided_student_is_sampled_with_one_evaluation_a_step(make, monkeypatch):
    config, tensors = trained(make, **CASES["guided"])
    network = distill.GuidedNetwork(UViT(config.model))
    network.load_state_dict(tensors)
    options = {"num_steps": 4, "guidance": 2.5, "sampler": "dpmpp_2m"}
    with counted(monkeypatch) as seen:
        found = generate(config, tensors, 3, **options, seed=4, batch_size=2, device=WORLD.device)
    assert sum(seen) == 3 * 4
    denoiser = Denoiser(network.at(1.5), config.diffusion.noise_schedule(config.model), "v")
    assert torch.equal(found, sample(denoiser, **drawn(config), sampler="dpmpp_2m", num_steps=4))
    options["guidance"] = 3.5
    assert not torch.equal(found, generate(config, tensors, 3, **options, seed=4, device=WORLD.device))


@pytest.mark.parametrize("name", ["progressive", "progressive, told", "consistency", "consistency, told"])
def test_students_are_sampled_in_their_own_steps(make, name):
    levels = (2.0, 0.5) if "consistency" in name else ()
    config, tensors = trained(make, **CASES[name], sampling_levels=levels)
    schedule, told = config.diffusion.noise_schedule(config.model), config.stage.strengths is not None
    network = distill.GuidedNetwork(UViT(config.model)) if told else UViT(config.model)
    network.load_state_dict(tensors)
    if levels:
        transitions = distill.consistency_transitions(schedule, levels)
    else:
        transitions = distill.progressive_transitions(schedule, config.stage.num_steps)
    assert len(transitions) == config.stage.sampling_steps
    denoiser = Denoiser(network.at(1.0) if told else network, schedule, "v")
    wanted = sample(denoiser, **drawn(config), transitions=transitions)
    options = {"seed": 4, "batch_size": 2, "device": WORLD.device}
    scale = {"guidance": 2.0} if told else {}
    assert torch.equal(generate(config, tensors, 3, **options, **scale), wanted)
    assert torch.equal(generate(config, tensors, 3, **options, **scale, num_steps=len(transitions)), wanted)
    refused = {"num_steps": 7, "sampler": "heun", "eta": 1.0, "guidance_interval": (0.1, 1.0)}
    refused |= {"guidance": 6.0 if told else 2.0}
    for option, value in refused.items():
        with pytest.raises(ValueError, match=r"the run is a|guidance is 6, but the student was trained with 1\.5 to 4"):
            generate(config, tensors, 3, **{**options, **scale, option: value})


def test_guidance_wants_to_have_been_learnt(make):
    """A student that is not told can be guided if it has seen images without a class."""
    config, tensors = trained(make, **CASES["not told, drops labels"])
    options = {"num_steps": 2, "device": WORLD.device}
    plain, guided = (generate(config, tensors, 3, **options, guidance=scale) for scale in (1.0, 4.0))
    assert not torch.equal(plain, guided)
    config = replace(config, stage=replace(config.stage, label_drop=0.0))
    assert torch.equal(generate(config, tensors, 3, **options), plain)
    with pytest.raises(ValueError, match="the run was not trained both with and without classes"):
        generate(config, tensors, 3, **options, guidance=4.0)


def test_a_preview_is_of_the_averaged_weights_at_the_least_scale(make):
    config, teacher = make(**CASES["guided"])
    stage = build_stage(config, WORLD, None, teacher)
    train(stage, config)
    options = {"num_steps": 5, "seed": config.seed, "device": WORLD.device}
    wanted = generate(config, stage.pieces()["ema"], 4, guidance=1.5, **options)
    assert torch.equal(stage.preview(4, num_steps=5), wanted)


def test_a_recipe_from_noise_to_one_step(make_config, tmp_path):
    """eps, v of eps, then half the steps twice, by way of run folders."""
    base = make_config()
    stages = [("pretrain", replace(base.stage, num_images=8))]
    common = {"num_images": 8, "batch_size": 4}
    stages.append(("convert", RegressionConfig(method="guided", predicts="v", **common)))
    stages += progressive_stages(4, 1, **common)
    recipe = Recipe(**{f.name: getattr(base, f.name) for f in dataclasses.fields(Recipe) if f.name != "stages"},
                    stages=tuple(stages))  # fmt: skip
    assert train_recipe(recipe, tmp_path / "runs").finished
    found = [load_weights(tmp_path / "runs" / name).config for name, _ in recipe.runs()]
    assert [config.diffusion.prediction for config in found] == ["eps", "v", "v", "v"]
    weights = load_weights(tmp_path / "runs")
    assert weights.config.stage.num_steps == 1
    assert generate(weights.config, weights.tensors, 2, device=WORLD.device).shape == (2, 8, 8, 3)
