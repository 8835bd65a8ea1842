"""Options of DxMI: published ones, those that belong together, and what cannot work."""

import functools
from dataclasses import replace

import pytest

from maskdm_fast import distill
from maskdm_fast.train.config import PolicyDistillationConfig, RunConfig
from tests.train.policy_toys import CASES, VIT, make_policy_run


@pytest.fixture
def make(make_student):
    return functools.partial(make_policy_run, make_student)


def test_learning_rates(make):
    stage = make(lr=1e-3, value_lr=4e-3, warmup_images=16).stage
    assert [stage.lr_at(step) for step in (0, 1, 4)] == pytest.approx([2.5e-4, 5e-4, 1e-3])
    assert [stage.value_lr_at(step) for step in (0, 1, 4)] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert [stage.sigma_lr_at(step) for step in (0, 1, 4)] == pytest.approx([2.5e-2, 5e-2, 0.1])
    assert replace(stage, sigma_lr=2e-3).sigma_lr_at(9) == 2e-3


def test_the_defaults_are_published():
    stage = PolicyDistillationConfig()
    stage.validate(RunConfig().model, has_classes=False)
    method, steps = stage.method(), stage.steps(RunConfig().diffusion.noise_schedule(RunConfig().model))
    assert (method, steps.start_std) == (distill.DxMIConfig(num_steps=10), 1.0)
    assert steps.steps[0].std == pytest.approx(0.8372, abs=1e-4) and steps.steps[-1].std == 1e-3
    assert (stage.batch_size, stage.lr, stage.sigma_lr_at(0), stage.value_lr) == (128, 1e-7, pytest.approx(1e-5), 1e-5)
    assert stage.max_grad_norm == 0.1 and replace(stage, time_cost="linear").method().time_costs()[0] == 0.05
    value = stage.make_value(RunConfig().model, seed=0)
    assert sum(parameter.numel() for parameter in value.parameters()) == pytest.approx(5.13e6, rel=2e-3)


def test_configurations_come_back_from_json(make):
    for changes in CASES.values():
        config = make(**changes)
        assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"tau_entropy": -1.0}, "tau_entropy is -1.0"),
        ({"num_policy_updates": 5}, "num_policy_updates is 5, want 1 to num_steps 4"),
        ({"fixed_sigmas": 4}, "fixed_sigmas is 4, want 0 to 3"),
        ({"policy": "ve", "alpha_bars": (0.1, 0.2, 0.3, 0.4)}, "policy is ve, and alpha_bars .* want ddpm's only"),
        ({"rho": 4.0}, "policy is ddpm, and rho is 4.0, want ve's only"),
        ({"stochastic_last": True}, "stochastic_last is True, want ve's only"),
        ({"alpha_bars": (0.1, 0.2)}, "want as many as num_steps, 4"),
        ({"alpha_bars": (0.1, 0.05, 0.3, 0.4)}, "rising in"),
        ({"alpha_bars": (0.001, 0.2, 0.3, 0.4)}, "each by less than 100 times"),
        ({"num_steps": 3, "num_policy_updates": 1}, "signal share before the first step is 0.524, want 0.5 at most"),
        ({"alpha_bars": (0.6, 0.7, 0.8, 0.9)}, "is 0.6, want 0.5 at most: give --alpha-bars"),
        ({"value_depth": 2}, "value is resnet, and value_depth is 2, want vit's only"),
        ({"value_time": True}, "value_time is True, want vit's only"),
        ({**VIT, "value_heads": 3}, "multiple of num_heads"),
        ({"value_lr": 0.0}, "value_lr is 0.0, want more than 0"),
    ],
)
def test_what_cannot_work(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).validate()


def test_a_residual_value_halves_three_times(make):
    config = make()
    with pytest.raises(ValueError, match="image_size is 12, want a multiple of 8"):
        replace(config, model=replace(config.model, image_size=12)).validate()
    replace(make(**VIT), model=replace(config.model, image_size=12)).validate()
