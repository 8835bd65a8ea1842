"""Masks that change within a run: schedules, ratios per image, a share of whole images."""

import json
from dataclasses import replace

import pytest

from maskdm_fast.diffusion import BlockMask, CropMask, MaskSchedule, NoMask, PatchMask
from maskdm_fast.train import RunConfig, checkpoint, read_metrics, train
from maskdm_fast.train.config import DenoisingConfig
from maskdm_fast.train.config_json import differences

STEPS = MaskSchedule("steps", ((0.25, 16), (0.0, 32)))


def logged(folder, name):
    return [record[name] for record in read_metrics(folder) if record["kind"] == "log"]


def weights(folder):
    return {path.name: path.read_bytes() for path in checkpoint.newest(folder).path.glob("*.safetensors")}


def test_a_schedule_moves_the_ratio_at_its_images(make_config, tmp_path):
    """16 patches an image; a log line every 8 images."""
    train(make_config(mask=PatchMask(0.5), mask_schedule=STEPS), tmp_path)
    assert logged(tmp_path, "mask_ratio") == [0.5, 0.5, 0.25, 0.25, 0.0, 0.0]


def test_the_first_steps_are_those_of_a_run_without_a_schedule(make_config, tmp_path):
    train(make_config(mask_schedule=STEPS), tmp_path / "schedule")
    train(make_config(), tmp_path / "constant")
    schedule, constant = (logged(tmp_path / name, "loss") for name in ("schedule", "constant"))
    assert schedule[:2] == constant[:2] and schedule[2] != constant[2]


@pytest.mark.parametrize("schedule", [STEPS, MaskSchedule("linear", ((0.0, 40),))], ids=lambda s: s.kind)
def test_resuming_across_a_change_of_ratio_changes_nothing(make_config, tmp_path, schedule):
    """Stopped one step before the image 16, where the steps change, and at it."""
    config = make_config(mask_schedule=schedule, log_images=12)
    train(config, tmp_path / "whole")
    for stop in (12, 16):
        folder = tmp_path / str(stop)
        train(replace(config, stage=replace(config.stage, num_images=stop)), folder)
        train(config, folder)
        assert weights(folder) == weights(tmp_path / "whole")
        for name in ("loss", "mask_ratio"):
            assert logged(folder, name) == logged(tmp_path / "whole", name)


PACKED = [
    {"mask": PatchMask(0.25, 0.9)},
    {"mask": BlockMask(0.5, 2), "unmasked_share": 0.5},
    {"mask": PatchMask(0.5), "unmasked_share": 0.5, "mask_schedule": STEPS},
]


@pytest.mark.parametrize("changes", PACKED, ids=["range", "unmasked_share", "schedule_and_share"])
def test_packed_runs_resume_exactly_and_micro_batches_change_rounding_only(make_config, tmp_path, changes):
    config = make_config(**changes)
    train(config, tmp_path / "whole")
    train(replace(config, stage=replace(config.stage, num_images=20)), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    ratios = logged(tmp_path / "whole", "mask_ratio")
    assert len(set(ratios)) > 2 and all(0.0 <= ratio < 0.9 for ratio in ratios)

    # Adam would blow up rounding errors of near-zero gradients, so few steps are compared.
    for name, size in (("one", None), ("split", 3)):
        train(make_config(**changes, num_images=8, log_images=4, micro_batch_size=size), tmp_path / name)
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("mask_ratio", 1e-6)):
        assert logged(tmp_path / "split", name) == pytest.approx(logged(tmp_path / "one", name), rel=tolerance)


def test_configurations_survive_json():
    for changes in (*PACKED, {"mask": PatchMask(0.9), "mask_schedule": MaskSchedule("linear", ((0.0, 200_000),))}):
        run = RunConfig(stage=replace(DenoisingConfig(), **changes))
        run.validate()
        assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_schedule_may_not_change_when_a_run_resumes():
    old, new = (RunConfig(stage=DenoisingConfig(mask=PatchMask(0.5), mask_schedule=s)) for s in (MaskSchedule(), STEPS))
    assert differences(old.to_dict(), new.to_dict()) == ["stage.mask_schedule: constant -> steps:0.25@16,0.0@32"]


def test_runs_from_before_schedules_take_the_defaults():
    values = RunConfig().to_dict()
    del values["stage"]["mask_schedule"], values["stage"]["unmasked_share"]
    assert RunConfig.from_dict(values) == RunConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": CropMask(2), "mask_schedule": STEPS}, "the mask schedule moves the ratio of a mask"),
        ({"mask_schedule": STEPS}, r"this mask is NoMask\(\)"),
        ({"mask": PatchMask(0.1, 0.5), "mask_schedule": STEPS}, "one ratio for the whole batch"),
        ({"mask": PatchMask(0.5), "unmasked_share": 1.5}, "unmasked_share is 1.5, want a number from 0 to 1"),
        ({"mask": NoMask(), "unmasked_share": 0.5}, "unmasked_share is 0.5, but all images are whole; set a mask"),
    ],
)
def test_validation(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(stage=replace(DenoisingConfig(), **changes)).validate()
