"""The objective's share in noise levels: what is predicted, how times are drawn, what they weigh."""

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.diffusion import LossWeight, MaskedObjective, PatchMask, TimestepDraw, make_schedule, patchify
from maskdm_fast.random import Stream

DRAW = {"seed": 11, "step": 5, "slots": torch.arange(6)}
MASK = PatchMask(0.5)


class Recorder:
    def __call__(self, tokens, t, ids_keep, labels):
        self.tokens, self.t = tokens, t
        return 0.5 * tokens


def make_images():
    return torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["shifted-cosine", "vp", "flow", "edm"])
@pytest.mark.parametrize("kind", ["none", "min-snr", "edm"])
def test_loss_is_the_weighted_error_of_the_natural_prediction(name, kind):
    schedule, model, weight = make_schedule(name, 128), Recorder(), LossWeight(kind)
    objective = MaskedObjective(schedule, MASK, 4, weight=weight, timesteps=TimestepDraw("lognormal", num_strata=6))
    out = objective(model, make_images(), None, **DRAW)
    assert torch.equal(out["t"], objective.timesteps(schedule, **DRAW))
    assert torch.equal(model.t, schedule.time_input(out["t"]))

    alpha, sigma = (scale[:, None, None] for scale in schedule.alpha_sigma(out["t"]))
    x0 = patchify(make_images().permute(0, 3, 1, 2) / 127.5 - 1, 4)
    eps = random.normal(4 * 48, stream=Stream.NOISE, **DRAW).view(6, 4, 48)
    target = {"flow": eps - x0, "edm": -0.5 * alpha * eps + 2 * sigma * x0}.get(name, eps)
    xt = alpha * x0 + sigma * eps
    rows = MASK.sample((2, 2), **DRAW)[:, :, None].expand(-1, -1, 48)
    want = (0.5 * xt - target).gather(1, rows).square().mean(dim=(1, 2))
    factors = weight(*schedule.alpha_sigma(out["t"]), objective.prediction)
    want = want if factors is None else want * factors
    torch.testing.assert_close(model.tokens, xt.gather(1, rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss_per_image"], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss"], want.mean(), rtol=1e-4, atol=1e-5)


def test_weighted_gradient_is_the_weight_times_the_gradient():
    schedule, scale = make_schedule("cosine"), torch.ones(6, 1, 1, requires_grad=True)

    def network(tokens, t, ids_keep, labels):
        return scale * tokens

    grads = []
    for weight in (LossWeight(), LossWeight("min-snr")):
        out = MaskedObjective(schedule, MASK, 4, weight=weight)(network, make_images(), None, **DRAW)
        grads.append(torch.autograd.grad(out["loss"], scale)[0].flatten())
    factors = LossWeight("min-snr")(*schedule.alpha_sigma(out["t"]), "eps")
    torch.testing.assert_close(grads[1], factors * grads[0])


def test_predictions_must_fit_the_schedule():
    with pytest.raises(ValueError, match="prediction 'eps' does not go with FlowSchedule, want flow or x0"):
        MaskedObjective(make_schedule("flow"), MASK, 4, "eps")
