import dataclasses
import json
import math
from dataclasses import replace

import pytest

from maskdm_fast.diffusion import LossWeight, TimestepDraw
from maskdm_fast.diffusion.mask_text import format_mask, parse_mask
from maskdm_fast.diffusion.masking import BlockMask, CropMask, NoMask, PatchMask
from maskdm_fast.distill import DMD2, GuidanceScales, SiD, SiDA
from maskdm_fast.models import CONFIGS, UViTConfig
from maskdm_fast.train import PRESETS, Recipe, RunConfig
from maskdm_fast.train.config import (
    DenoisingConfig,
    DiffusionConfig,
    MachineConfig,
    OutputConfig,
    PolicyDistillationConfig,
    RegressionConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.config_json import differences


def runs_of(name: str) -> list[RunConfig]:
    config = PRESETS[name]()
    return [run for _, run in config.runs()] if isinstance(config, Recipe) else [config]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    for run in runs_of(name):
        run.validate()
        assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize("name", PRESETS)
def test_presets_document_themselves_in_one_line(name):
    assert len(PRESETS[name].__doc__.splitlines()) == 1


def test_maskdm_presets_have_the_settings_of_its_configuration_files():
    """Rows of the published configuration files, one per kind of run."""
    half_life = {0.999: 692.8, 0.9999: 6931.1}  # in steps: ln 0.5 / ln decay
    rows = {
        # name, stage: mask, batch, lr, warm-up steps, clip, EMA decay, schedule, hflip
        ("small64", 0): ("block:0.9:4", 256, 2e-4, 0, None, 0.999, "linear", 0.0),
        ("small64", 1): ("none", 128, 2e-4, 0, None, 0.999, "linear", 0.0),
        ("celebahq-base", 0): ("block:0.9:4", 256, 2e-4, 0, 1.0, 0.999, "cosine", 0.0),
        ("celebahq-base", 1): ("block:0.5:4", 64, 2e-4, 5000, 1.0, 0.999, "cosine", 0.0),
        ("celebahq-base", 2): ("none", 32, 1e-5, 5000, 1.0, 0.999, "cosine", 0.0),
        ("church256-base", 0): ("none", 64, 1e-4, 5000, 1.0, 0.9999, "linear", 0.5),
        ("vggface2-small", 0): ("block:0.9:4", 256, 2e-4, 0, 1.0, 0.999, "cosine", 0.0),
        ("celebahq-small", 0): ("block:0.9:4", 256, 2e-4, 0, 1.0, 0.999, "cosine", 0.0),
        ("celebahq-small-10p", 0): ("none", 64, 5e-5, 0, None, 0.999, "cosine", 0.5),
    }
    for (name, number), (mask, batch, lr, warmup, clip, decay, schedule, hflip) in rows.items():
        run = runs_of(name)[number]
        stage = run.stage
        found = (format_mask(stage.mask), stage.batch_size, stage.lr, stage.max_grad_norm, stage.hflip)
        assert found == (mask, batch, lr, clip, hflip), name
        assert (stage.warmup_images, stage.num_images) == (warmup * batch, 200_000 * batch), name
        assert stage.ema_half_life_images == pytest.approx(half_life[decay] * batch, rel=1e-4), name
        assert stage.ema_decay == pytest.approx(decay, abs=1e-7), name
        assert (stage.betas, stage.weight_decay, run.diffusion.schedule) == ((0.99, 0.99), 0.03, schedule), name
        assert run.diffusion.prediction == "eps", name
    assert [run.data_share for name in ("celebahq-small-10p", "celebahq-small-1p") for run in runs_of(name)] == [
        0.1,
        0.01,
    ]


@pytest.mark.parametrize("mask", ["patch:0.1", "block:0.9:2", "block:0.5:4", "block:0.5:8", "crop:15", "crop:5"])
def test_masks_of_the_ablations_suit_small64(mask):
    run = PRESETS["small64-pretrain"]()
    replace(run, stage=replace(run.stage, mask=parse_mask(mask))).validate()


def test_single_stages_are_those_of_their_recipe():
    for recipe, stage in (("emoji32", "finetune"), ("small64", "pretrain"), ("celebahq-base", "pretrain50")):
        alone = PRESETS[f"{recipe}-{stage}"]()
        whole = dict(PRESETS[recipe]().stages)[stage]
        assert replace(alone.stage, init_from=None) == whole
        assert alone.model == PRESETS[recipe]().model


def test_recipe_chains_its_stages():
    (first_name, first), (second_name, second) = PRESETS["emoji32"]().runs()
    assert (first_name, second_name) == ("1-pretrain", "2-finetune")
    assert first.stage.init_from is None
    assert second.stage.init_from == "1-pretrain"
    assert isinstance(first.stage.mask, BlockMask) and second.stage.mask == NoMask()


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("none", NoMask()),
        ("patch:0.9", PatchMask(0.9)),
        ("block:0.75:4", BlockMask(0.75, 4)),
        ("crop:5", CropMask(5)),
    ],
)
def test_mask_text_round_trip(text, mask):
    assert parse_mask(text) == mask
    assert format_mask(mask) == text


@pytest.mark.parametrize(
    "text", ["", "patch", "patch:x", "patch:1.0", "patch:-0.1", "block:0.5", "crop:0", "none:1", "tile:3"]
)
def test_bad_mask_text_says_what_is_wanted(text):
    with pytest.raises(ValueError, match=r"want none\|patch:RATIO"):
        parse_mask(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"num_images": -1}, "num_images is -1"),
        ({"num_images": None}, "would never end"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"warmup_images": -1}, "warmup_images is -1"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"hflip": 1.5}, "hflip is 1.5"),
        ({"label_drop": 0.1}, "the model has no classes"),
        ({"label_drop": 1.0}, "label_drop is 1.0, want a number from 0 to 1, and less than 1"),
        ({"mask": BlockMask(0.5, 3)}, "does not divide the grid"),
        ({"mask": CropMask(9)}, "does not fit"),
        ({"ema_half_life_images": 0}, "ema_half_life_images is 0"),
    ],
)
def test_stage_validation_names_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(stage=replace(DenoisingConfig(), **changes)).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "flow"}, "prediction eps does not go with schedule flow; want --prediction flow or x0"),
        ({"schedule": "edm", "prediction": "v"}, "want --prediction edm or x0"),
        ({"prediction": "edm"}, "want --prediction eps or x0 or v"),
        ({"schedule": "quadratic"}, "unknown noise schedule 'quadratic'"),
        ({"loss_weight": "snr"}, "unknown loss weight 'snr'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0"),
        ({"timesteps": "beta"}, "unknown timestep draw 'beta'"),
        ({"lognormal_std": -1.0}, "std of the timestep draw is -1.0"),
    ],
)
def test_diffusion_validation_names_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(diffusion=DiffusionConfig(**changes)).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sid", "adversarial": 0.1}, "method sid has no adversarial; leave it out"),
        ({"method": "sid", "freeze_images": 0}, "method sid has no freeze_images; leave it out"),
        ({"method": "dmd2", "alpha": 1.2}, "method dmd2 has no alpha; leave it out"),
        ({"method": "dmd2", "adversarial": 0.0}, "a discriminator is trained and used, or neither"),
        ({"weighting": "snr"}, "unknown weighting 'snr'"),
        ({"levels": (2.0, 1.0)}, "want 0 < least < greatest"),
        ({"level_draw": "beta"}, "unknown draw of noise levels 'beta'"),
        ({"fake_weight": "snr"}, "unknown loss weight 'snr'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"input_level": 0.0}, "input_level is 0.0, want more than 0"),
        ({"fake_updates": 0}, "fake_updates is 0"),
        ({"fake_lr": 0.0}, "fake_lr is 0.0"),
        ({"fake_betas": (0.0, 1.0)}, "fake_betas is"),
        ({"max_grad_value": 0.0}, "max_grad_value is 0.0"),
        ({"guidance_scale": 2.0}, "guidance mode 'none' has no scale"),
        ({"guidance": "lsg"}, "guidance is lsg, but the model has no classes; add --class-conditional"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_score_distillation_validation_names_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(stage=ScoreDistillationConfig(**changes)).validate()


def test_score_distillation_makes_the_published_methods():
    sid, sida, dmd2 = (ScoreDistillationConfig(method=name).make() for name in ("sid", "sida", "dmd2"))
    assert (sid, sida, dmd2) == (SiD(), SiDA(), DMD2())
    other = ScoreDistillationConfig(
        method="sida", alpha=0.7, adversarial=0.2, levels=(0.1, 5.0), level_draw="uniform", guidance="zero"
    ).make()
    assert (other.alpha, other.adversarial, other.freeze_images) == (0.7, 0.2, SiDA().freeze_images)
    assert (other.levels.kind, other.levels.least, other.levels.greatest) == ("uniform", 0.1, 5.0)
    assert other.guidance == GuidanceScales.of_mode("zero")
    assert ScoreDistillationConfig(num_steps=2).input_levels() == (2.5, 1.25)
    assert ScoreDistillationConfig(method="dmd2").input_levels() == (80.0,)
    assert ScoreDistillationConfig(input_level=10.0, num_steps=4).input_levels() == (10.0, 7.5, 5.0, 2.5)


STAGES = [DenoisingConfig(), ScoreDistillationConfig(method="dmd2", levels=(0.1, 9.0), fake_betas=(0.5, 0.9))]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.kind)
def test_kinds_of_stages_survive_json(stage):
    config = RunConfig(stage=stage)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["stage"]["kind"] == stage.kind
    assert RunConfig.from_dict(values) == config


def test_runs_from_before_there_were_kinds_denoise():
    values = RunConfig().to_dict()
    del values["stage"]["kind"]
    assert RunConfig.from_dict(values) == RunConfig()
    assert differences(RunConfig.from_dict(values).to_dict(), RunConfig().to_dict()) == []


def test_a_kind_that_nobody_knows():
    values = RunConfig().to_dict()
    values["stage"]["kind"] = "flow-matching"
    with pytest.raises(ValueError, match="no stage of kind 'flow-matching'; another version of the package wrote it"):
        RunConfig.from_dict(values)
    values["stage"]["kind"] = "score-distillation"
    with pytest.raises(ValueError, match=r"ScoreDistillationConfig has no label_drop, mask"):
        RunConfig.from_dict(values)


def test_kinds_differ():
    old, new = (RunConfig(stage=stage).to_dict() for stage in STAGES)
    assert "stage.kind: denoising -> score-distillation" in differences(old, new)


def test_diffusion_config_says_what_the_objective_gets():
    config = DiffusionConfig(
        schedule="flow", prediction="flow", loss_weight="p2", p2_gamma=0.5, timesteps="lognormal", stratified=True
    )
    RunConfig(diffusion=config).validate()
    assert config.weight() == LossWeight("p2", p2_gamma=0.5)
    assert config.draw(64) == TimestepDraw("lognormal", -1.2, 1.2, num_strata=64)
    assert DiffusionConfig().draw(64) == TimestepDraw()
    shifted = DiffusionConfig("shifted-cosine")
    half = [shifted.noise_schedule(CONFIGS[size]).alpha_bar[500] for size in ("small64", "small256")]
    assert half[1] < half[0] / 4


def test_runs_from_before_the_diffusion_options_are_the_same():
    values = RunConfig().to_dict()
    values["diffusion"] = {"schedule": "cosine", "prediction": "eps"}
    assert differences(RunConfig.from_dict(values).to_dict(), RunConfig().to_dict()) == []


def test_run_validation():
    with pytest.raises(ValueError, match="seed is -1"):
        RunConfig(seed=-1).validate()
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        RunConfig(machine=MachineConfig(micro_batch_size=0)).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_bound": -1.0}, "latent_bound is -1.0, want more than 0, or None"),
        ({"latent_shift": 2.0}, "there is no latent_scale, and latent_shift is 2.0, want 0"),
        ({"latent_scale": 0.0}, "the scale of latents is 0.0"),
        ({"latent_scale": 2.0, "latent_bound": 0.0}, "latent_bound is 0.0"),
        (
            {"latent_scale": 2.0, "output": OutputConfig(preview_images=4)},
            "latent_scale is 2.0, which only latents have; preview_images is 4, want 0: pictures of latents",
        ),
    ],
)
def test_validation_of_latents_names_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes).validate()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [DenoisingConfig, ScoreDistillationConfig, RegressionConfig, PolicyDistillationConfig])
def test_every_number_is_finite(kind, value):
    """A learning rate of infinity is more than 0."""
    config = RunConfig(stage=kind(), latent_bound=1.0)
    for part in ("", "stage", "diffusion", "machine"):
        owner = getattr(config, part) if part else config
        for field in dataclasses.fields(owner):
            if isinstance(getattr(owner, field.name), float):
                changed = replace(owner, **{field.name: value})
                with pytest.raises(ValueError, match=rf"^{field.name} is {value}, want a finite number"):
                    (replace(config, **{part: changed}) if part else changed).validate()
    with pytest.raises(ValueError, match=f"betas is {value}, want a finite number"):
        replace(config, stage=kind(betas=(0.5, value))).validate()


def test_warmup_is_linear_and_the_first_step_learns():
    stage = DenoisingConfig(lr=1.0, batch_size=10, warmup_images=40)
    assert [stage.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert replace(stage, warmup_images=0).lr_at(0) == 1.0


def test_ema_half_life_is_in_images():
    stage = DenoisingConfig(batch_size=50, ema_half_life_images=1000)
    assert stage.ema_decay**20 == pytest.approx(0.5)


def test_differences_lists_only_what_may_not_change():
    old = RunConfig()
    new = replace(
        old,
        seed=1,
        data="elsewhere",
        data_share=0.5,
        model=replace(old.model, dim=384),
        machine=MachineConfig(device="cpu"),
        output=replace(old.output, log_images=5),
        stage=replace(old.stage, num_images=5, max_seconds=3.0, mask=PatchMask(0.5)),
    )
    assert differences(old.to_dict(), new.to_dict()) == [
        "data_share: 1.0 -> 0.5",
        "model.dim: 192 -> 384",
        "seed: 0 -> 1",
        "stage.mask: none -> patch:0.5",
    ]


def test_from_dict_of_other_versions():
    values = RunConfig().to_dict()
    del values["stage"]["betas"]
    assert RunConfig.from_dict(values) == RunConfig()
    values["stage"]["momentum"] = 0.9
    with pytest.raises(ValueError, match="DenoisingConfig has no momentum"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    "changes", [{"precision": "fp16"}, {"stage": DenoisingConfig(optimizer="lamb")}], ids=["fp16", "lamb"]
)
def test_apex_computes_adamw_only(changes):
    config = replace(RunConfig(machine=MachineConfig(optimizer_kernel="apex")), **changes)
    with pytest.raises(ValueError, match="optimizer_kernel apex computes AdamW without a loss scale"):
        config.validate()


def test_model_config_is_kept():
    model = UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2, num_classes=3)
    assert RunConfig.from_dict(RunConfig(model=model).to_dict()).model == model
