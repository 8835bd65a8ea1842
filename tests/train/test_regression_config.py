"""Options of distillation by regression: which belong to which method, what they make, who can teach whom."""

import itertools
from dataclasses import replace

import pytest

from maskdm_fast import cli
from maskdm_fast.diffusion import Guidance, TimestepDraw
from maskdm_fast.distill import ConsistencyDistillation, GuidedDistillation, ProgressiveDistillation, StepMapping
from maskdm_fast.models import UViTConfig
from maskdm_fast.train import PRESETS
from maskdm_fast.train.config import DenoisingConfig, Recipe, RegressionConfig, RunConfig, ScoreDistillationConfig
from maskdm_fast.train.regression_config import progressive_stages

MODEL = UViTConfig(image_size=8, patch_size=4, dim=16, depth=3, num_heads=2, num_classes=3)

MADE = {
    "consistency, as published": (
        {"batch_size": 128},
        ConsistencyDistillation(patch_size=4, mapping=StepMapping(25_000, 8)),
    ),
    "consistency": (
        {
            "images_per_stage": 1_000,
            "batch_size": 64,
            "num_stages": 4,
            "gap_factor": 16.0,
            "solver": "heun",
            "huber": 0.03,
            "weight": "edm",
            "level_draw": "uniform",
            "even_levels": True,
            "guidance": 2.0,
        },
        ConsistencyDistillation(
            patch_size=4,
            mapping=StepMapping(16, 4, 16.0),
            solver="heun",
            huber=0.03,
            weight="edm",
            timesteps=TimestepDraw("uniform", -1.1, 2.0, 64),
            guidance=Guidance(2.0),
        ),
    ),
    "guided, as published": (
        {"method": "guided", "strengths": (0.0, 4.0)},
        GuidedDistillation(patch_size=4, strengths=(0.0, 4.0)),
    ),
    "guided": (
        {"method": "guided", "predicts": "v", "level_draw": "lognormal", "level_mean": 0.5, "hflip": 0.5},
        GuidedDistillation(patch_size=4, strengths=None, timesteps=TimestepDraw("lognormal", 0.5, 1.2), hflip=0.5),
    ),
    "progressive": (
        {"method": "progressive", "num_steps": 8, "weight": "snr-plus-one", "clip": 1.0, "even_levels": True},
        ProgressiveDistillation(patch_size=4, num_steps=8, weight="snr-plus-one", clip=1.0, num_strata=128),
    ),
}


@pytest.mark.parametrize(("options", "method"), MADE.values(), ids=MADE)
def test_options_make_the_method(options, method):
    config = RunConfig(model=MODEL, stage=RegressionConfig(**options))
    config.validate()
    assert config.stage.make(MODEL) == method
    assert RunConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["stage"]["kind"] == "regression-distillation"


def test_a_teacher_that_is_told_is_asked_once():
    config = RegressionConfig(method="progressive", num_steps=2, strengths=(1.0, 3.0))
    assert config.make(MODEL, told_teacher=True).told_teacher and not config.make(MODEL).told_teacher
    assert config.evaluations() == 7.0 and config.evaluations(told_teacher=True) == 5.0


WRONG = {
    "steps of consistency": ({"num_steps": 4}, "method consistency has no num_steps, which is for progressive; leave"),
    "a stage of progressive": (
        {"method": "progressive", "num_steps": 4, "images_per_stage": 5},
        "method progressive has no images_per_stage, which is for consistency",
    ),
    "times of progressive": (
        {"method": "progressive", "num_steps": 4, "level_draw": "uniform"},
        "method progressive has no level_draw, which is for guided and consistency",
    ),
    "another prediction": ({"predicts": "v"}, "method consistency has no predicts, which is for guided"),
    "no steps": ({"method": "progressive"}, "num_steps is None, want the steps of the student, 1 or more"),
    "steps": ({"method": "progressive", "num_steps": 0}, "num_steps is 0"),
    "nothing": ({"method": "guided"}, "nothing to learn: set strengths, guidance or predicts"),
    "drop": ({"method": "guided", "guidance": 2.0, "label_drop": 1.0}, "label_drop is 1.0, want a number from 0 to 1"),
    "drop of the told": (
        {"method": "guided", "strengths": (0.0, 1.0), "label_drop": 0.1},
        "label_drop is for a student without strengths",
    ),
    "both": ({"guidance": 2.0, "strengths": (0.0, 1.0)}, "strengths and guidance are both given"),
    "strengths": ({"strengths": (4.0, 0.0)}, r"strengths is \(4.0, 0.0\), want \(least, greatest\)"),
    "no teacher": ({"path": "data", "strengths": (0.0, 1.0)}, "path is data, so no teacher is asked, but strengths"),
    "no solver": ({"path": "data", "solver": "heun"}, "path is data, so no teacher is asked, but solver is for one"),
    "levels": ({"sampling_levels": (0.5, 0.8)}, r"sampling_levels is \(0.5, 0.8\), want falling noise levels"),
    "level": ({"sampling_levels": (0.0,)}, "want falling noise levels, more than 0"),
    "gap": ({"gap_factor": 1.0}, "gap_factor is 1.0, want more than 1"),
    "stage": ({"images_per_stage": 0}, "images_per_stage is 0, want 1 or more"),
    "stages": ({"num_stages": 0}, "num_stages is 0, want at least 1"),
    "huber": ({"huber": 0.0}, "huber is 0.0, want more than 0"),
    "weight": ({"method": "progressive", "num_steps": 4, "weight": "gap"}, "unknown weight 'gap', want one of none"),
    "lognormal": ({"level_draw": "uniform", "level_std": 1.0}, "level_draw is uniform, which has no level_mean"),
    "clip": ({"clip": -1.0}, "clip is -1.0, want the bound of the images, or None"),
    "rate": ({"lr": 0.0}, "lr is 0.0"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(model=MODEL, stage=RegressionConfig(**options)).validate()


@pytest.mark.parametrize(
    "options",
    [{"strengths": (0.0, 1.0)}, {"guidance": 2.0}, {"method": "guided", "predicts": "v", "label_drop": 0.1}],
)
def test_guidance_wants_classes(options):
    config = RunConfig(model=replace(MODEL, num_classes=0), stage=RegressionConfig(**options))
    with pytest.raises(ValueError, match=r"but the model has no classes; add --class-conditional"):
        config.validate()
    replace(config, class_conditional=True).validate()


def test_steps_and_predictions_of_students():
    assert RegressionConfig(method="progressive", num_steps=4).sampling_steps == 4
    assert RegressionConfig(sampling_levels=(1.0, 0.5)).sampling_steps == 3
    guided = RegressionConfig(method="guided", predicts="v")
    assert guided.sampling_steps == DenoisingConfig().sampling_steps
    assert guided.student_prediction("eps") == "v" and RegressionConfig().student_prediction("x0") == "x0"


TOLD = RegressionConfig(method="guided", strengths=(0.0, 4.0))
PLAIN = RegressionConfig(method="guided", predicts="v")
EIGHT = RegressionConfig(method="progressive", num_steps=8)
GUIDED = ScoreDistillationConfig(guidance="teacher", guidance_scale=2.0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (EIGHT, DenoisingConfig()),
        (EIGHT, PLAIN),
        (RegressionConfig(method="progressive", num_steps=4), EIGHT),
        (replace(EIGHT, strengths=(1.0, 4.0)), TOLD),
        (replace(EIGHT, num_steps=4, strengths=(1.0, 2.0)), replace(EIGHT, strengths=(1.0, 4.0))),
        (TOLD, replace(PLAIN, label_drop=0.1)),
        (TOLD, DenoisingConfig(label_drop=0.1)),
        (GUIDED, DenoisingConfig(label_drop=0.1)),
        (GUIDED, replace(PLAIN, label_drop=0.1)),
        (ScoreDistillationConfig(guidance="zero"), DenoisingConfig()),
        (ScoreDistillationConfig(guidance="teacher"), DenoisingConfig()),
        (RegressionConfig(strengths=(0.0, 4.0)), TOLD),
    ],
)
def test_who_can_be_a_teacher(student, teacher):
    student.check_teacher(teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (EIGHT, ScoreDistillationConfig(), "it comes from score-distillation: it makes images in its own steps"),
        (EIGHT, RegressionConfig(), "it comes from regression-distillation: it makes images in its own steps"),
        (EIGHT, EIGHT, "it makes images in 8 steps, .* want method progressive with num_steps 4"),
        (RegressionConfig(), EIGHT, "want method progressive with num_steps 4"),
        (ScoreDistillationConfig(), EIGHT, "it makes images in its own steps"),
        (ScoreDistillationConfig(), TOLD, "it makes images in its own steps"),
        (EIGHT, TOLD, "told how strongly it is guided: want strengths within 0 4, not None"),
        (replace(EIGHT, strengths=(-1.0, 2.0)), TOLD, r"within 0 4, not \(-1.0, 2.0\)"),
        (TOLD, PLAIN, "it was not trained both with and without classes, so it cannot be guided: leave out guidance"),
        (replace(EIGHT, num_steps=4, guidance=2.0), EIGHT, "was not trained both with and without classes"),
        (TOLD, DenoisingConfig(), "was not trained both with and without classes"),
        (RegressionConfig(guidance=2.0), DenoisingConfig(), "was not trained both with and without classes"),
        (GUIDED, DenoisingConfig(), "was not trained both with and without classes"),
        (GUIDED, PLAIN, "was not trained both with and without classes"),
        (replace(GUIDED, guidance="lsg"), DenoisingConfig(), "was not trained both with and without classes"),
    ],
)
def test_who_cannot_be_a_teacher(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        student.check_teacher(teacher)


def test_rounds_halve_the_steps():
    stages = progressive_stages(16, 2, guidance=2.0, num_images=100, init_from="elsewhere")
    recipe = Recipe(model=MODEL, stages=stages)
    recipe.validate()
    runs = recipe.runs()
    assert [name for name, _ in runs] == ["1-steps8", "2-steps4", "3-steps2"]
    assert all(name.isidentifier() for name, _ in stages)  # so that they can be options
    assert [run.stage.num_steps for _, run in runs] == [8, 4, 2]
    assert [run.stage.teacher for _, run in runs] == ["emoji32", "1-steps8", "2-steps4"]
    # What the first round has learnt of guidance, the others learn from it.
    assert [(run.stage.guidance, run.stage.init_from) for _, run in runs] == [
        (2.0, "elsewhere"),
        (1.0, None),
        (1.0, None),
    ]
    for (_, teacher), (_, student) in itertools.pairwise(stages):
        student.check_teacher(teacher)
        assert student.num_images == 100
    with pytest.raises(ValueError, match="6 steps cannot be halved down to 2"):
        progressive_stages(6, 2)


def test_options_on_the_command_line(monkeypatch):
    """Those of one run stand beside the options of model and diffusion, those of a round carry its name."""
    monkeypatch.setitem(PRESETS, "one", lambda: RunConfig(stage=RegressionConfig()))
    monkeypatch.setitem(PRESETS, "rounds", lambda: Recipe(stages=progressive_stages(8, 2)))
    stage = cli._train_options("one", ["--sampling-levels", "2", "0.5", "--path", "data", "--level-std", "1"])[0].stage
    assert (stage.sampling_levels, stage.path, stage.level_std) == ((2.0, 0.5), "data", 1.0)
    told = ["--method", "guided", "--strengths", "0", "4", "--predicts", "v", "--class-conditional"]
    config = cli._train_options("one", told)[0]
    assert (config.stage.strengths, config.stage.predicts, config.diffusion.prediction) == ((0.0, 4.0), "v", "eps")
    rounds = dict(cli._train_options("rounds", ["--steps2.num-images", "77"])[0].stages)
    assert [rounds[name].num_images for name in ("steps4", "steps2")] == [1_000_000, 77]
    with pytest.raises(ValueError, match="method consistency has no num_steps"):
        cli._train_options("one", ["--num-steps", "4"])
