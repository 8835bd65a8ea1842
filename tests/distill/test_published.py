"""The numbers of the papers and their codes, written out: a default that changes is no longer the published method."""

import dataclasses

import pytest

from maskdm_fast.distill import (
    DMD2,
    METHODS,
    ConsistencyDistillation,
    DxMIConfig,
    GuidedDistillation,
    ProgressiveDistillation,
    SiD,
    SiDA,
    StepMapping,
    falling_levels,
)
from maskdm_fast.distill.dxmi_anomaly import FEATURES
from maskdm_fast.distill.dxmi_policy import fastdpm_alpha_bars

SHARED = {
    "weighting": "l1",
    "fake_score.weight.kind": "edm",
    "fake_score.scale": 1.0,
    "guidance.teacher": 1.0,
    "guidance.fake": 1.0,
    "guidance.fake_training": 1.0,
    "guidance.label_drop": 0.0,
}
OF_SID = {
    **SHARED,
    "scale": 100.0,
    "input_level": 2.5,
    "fake_updates": 1,
    "levels": ("karras", 0.002, 24.408, -1.2, 1.2),
    "fake_score.levels": ("lognormal", 0.002, 80.0, -1.2, 1.2),
    "fake_score.reduction": "sum",
}
UNIFORM = ("uniform", -1.2, 1.2, None)
PUBLISHED = {
    "sid": (SiD(), {**OF_SID, "alpha": 1.2, "needs_images": False}),
    "sida": (
        SiDA(),
        {
            **OF_SID,
            "alpha": 1.0,
            "needs_images": True,
            "adversarial": 0.01,
            "fake_adversarial": 1.0,
            "freeze_images": 100_000,
            "adversarial_from": 200_000,
        },
    ),
    "dmd2": (
        DMD2(),
        {
            **SHARED,
            "input_level": 80.0,
            "fake_updates": 5,
            "levels": ("karras", 0.00323, 71.7, -1.2, 1.2),
            "fake_score.levels": ("karras", 0.002, 80.0, -1.2, 1.2),
            "fake_score.reduction": "mean",
            "critic_levels": ("karras", 0.002, 80.0, -1.2, 1.2),
            "adversarial": 3e-3,
            "fake_adversarial": 1e-2,
            "needs_images": True,
        },
    ),
    "guided": (
        GuidedDistillation(patch_size=4),
        {"strengths": (0.0, 4.0), "weight": "truncated-snr", "clip": None, "timesteps": UNIFORM},
    ),
    "progressive": (
        ProgressiveDistillation(patch_size=4, num_steps=4),
        {"strengths": None, "weight": "truncated-snr", "clip": None},
    ),
    "consistency": (
        ConsistencyDistillation(patch_size=4, mapping=StepMapping(25_000)),
        {
            "weight": "gap",
            "timesteps": ("lognormal", -1.1, 2.0, None),
            "huber": 0.00054,
            "solver": "euler",
            "mapping": (25_000, 8, 2.0, 8.0, 1.0),
        },
    ),
    "dxmi": (
        DxMIConfig(num_steps=10),
        {
            "tau_entropy": 0.1,
            "tau_velocity": 0.01,
            "tau_convention": "per-dimension",
            "skip_last": 0,
            "entropy_in_value": None,
            "velocity_in_value": None,
            "time_cost": "sigmoid",
            "time_cost_scale": 1.0,
            "gamma": 1.0,
            "avr_decay": 0.99,
            "resample": False,
            "num_policy_updates": 1,
        },
    ),
    "dxmi on features": (
        FEATURES,
        {
            "num_steps": 5,
            "tau_entropy": 0.1,
            "tau_velocity": 0.1,
            "entropy_in_value": 0,
            "velocity_in_value": 0,
            "time_cost": "none",
            "resample": True,
        },
    ),
}


@pytest.mark.parametrize(("method", "numbers"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_defaults_are_the_published_numbers(method, numbers):
    for name, wanted in numbers.items():
        found = method
        for part in name.split("."):
            found = getattr(found, part)
        assert (dataclasses.astuple(found) if dataclasses.is_dataclass(found) else found) == wanted, name


def test_all_methods_of_score_distillation_are_there():
    assert METHODS.keys() <= PUBLISHED.keys()


def test_levels_of_dmd2_are_from_2_to_98_percent_of_the_ladder():
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    least, greatest = ((low + share * (high - low)) ** 7 for share in (0.02, 0.98))
    assert (DMD2().levels.least, DMD2().levels.greatest) == (
        pytest.approx(least, rel=2e-3),
        pytest.approx(greatest, rel=2e-3),
    )


def test_levels_of_sid_are_the_first_four_fifths_of_the_ladder():
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    assert SiD().levels.greatest == pytest.approx((low + 0.8 * (high - low)) ** 7, rel=1e-4)
    assert falling_levels(2.5, 4) == (2.5, 1.875, 1.25, 0.625)


def test_signal_shares_of_ten_steps():
    bars = [0.02081, 0.082652, 0.203027, 0.372955, 0.562018, 0.73488, 0.866706, 0.949321, 0.988876, 0.9999]
    assert fastdpm_alpha_bars(10, 0.0) == pytest.approx(bars, rel=2e-3)
