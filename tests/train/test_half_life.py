"""The half-life of the moving average is in training images, however many updates a batch is good for."""

import pytest

from maskdm_fast.optim import AdamWEMA
from maskdm_fast.train.config import PolicyDistillationConfig, RegressionConfig, ScoreDistillationConfig
from tests.train.by_hand import build, take_steps

STEPS = 10
STUDENTS = {
    "sid": (ScoreDistillationConfig, {}),
    "sid, two fake updates": (ScoreDistillationConfig, {"fake_updates": 2}),
    "dmd2, five as published": (ScoreDistillationConfig, {"method": "dmd2", "input_level": 10.0}),
    "dxmi": (PolicyDistillationConfig, {"num_steps": 4, "value_width": 8}),
    "dxmi, as many as steps": (
        PolicyDistillationConfig, {"num_steps": 4, "value_width": 8, "num_policy_updates": 4},
    ),
    "consistency": (RegressionConfig, {"images_per_stage": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), STUDENTS.values(), ids=STUDENTS)
def test_half_of_an_average_is_forgotten_in_a_half_life(make_student, monkeypatch, kind, options):
    """The product of the decays of all steps of an optimizer that averages, the policy's noise included."""
    left, step = {}, AdamWEMA.step

    def spy(self, *arguments, **keywords):
        (decay,) = {group["ema_decay"] for group in self.param_groups}
        if decay is not None:
            left[self] = left.get(self, 1.0) * decay
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(AdamWEMA, "step", spy)
    config = make_student(kind, ema_half_life_images=20, **options)
    take_steps(build(config), config, 0, STEPS)
    num_averages = 2 if kind is PolicyDistillationConfig else 1
    assert list(left.values()) == pytest.approx([0.5 ** (STEPS * config.stage.batch_size / 20)] * num_averages)
