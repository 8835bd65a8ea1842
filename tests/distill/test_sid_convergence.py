"""A generator that starts far from the data arrives there: independent values N(0.3, 1/4), generator ``b + c z``."""

import pytest
import torch
from torch import nn

from maskdm_fast import ops
from maskdm_fast.diffusion import Denoiser, EDMSchedule, make_schedule
from maskdm_fast.diffusion.prediction import coefficients
from maskdm_fast.distill import DMD2, Alternation, FakeScore, Generator, LevelDraw, Networks, SiD
from tests.distill.score_toys import TIME_OF_INPUT

MEAN, STD, NUM_VALUES = 0.3, 0.5, 16


def analytic(x, s, mean, std):
    return mean + std**2 / (std**2 + s**2) * (x - mean)


def test_with_the_optimal_fake_network():
    """T5. At the fixed point d vanishes with the noise of the gradient, so the answer is exact."""
    alphas, batch = (0.5, 0.75, 1.0, 1.2), 128
    draws = torch.Generator().manual_seed(0)
    b = torch.full((4, 2, 1, 1), -0.5, dtype=torch.float64, requires_grad=True)
    c = torch.tensor([1.0, 0.2], dtype=torch.float64).view(1, 2, 1, 1).repeat(4, 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([b, c], lr=2e-2, betas=(0.0, 0.999))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 1500)
    schedule, levels = EDMSchedule(), LevelDraw()
    for _ in range(1500):
        u = torch.rand(2 * batch, generator=draws, dtype=torch.float64)
        s = levels.times(schedule, u).double().view(2, batch, 1)
        z, eps = torch.randn(2, 2, batch, NUM_VALUES, generator=draws, dtype=torch.float64)
        x_g = b + c * z
        xt = x_g + s * eps
        teacher, fake = analytic(xt, s, MEAN, STD), analytic(xt, s, b.detach(), c.detach())
        losses = [
            ops.sid_loss(x_g[k].flatten(0, 1), teacher[k].flatten(0, 1), fake[k].flatten(0, 1), alpha=alpha)
            for k, alpha in enumerate(alphas)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        decay.step()
    torch.testing.assert_close(b, torch.full_like(b, MEAN), rtol=0, atol=1e-6)
    torch.testing.assert_close(c, torch.full_like(c, STD), rtol=0, atol=1e-6)


class Independent(nn.Module):
    """The denoiser of independent values N(mean, std^2), both learned, or the generator ``mean + std z``."""

    def __init__(self, name, prediction, mean, std, generates=False):
        super().__init__()
        self.name, self.prediction, self.generates = name, prediction, generates
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, tokens, t, ids_keep, labels):
        t = TIME_OF_INPUT.get(self.name, lambda t: t)(t)
        alpha, sigma = (scale.double()[:, None, None] for scale in make_schedule(self.name).alpha_sigma(t))
        if self.generates:
            x0 = self.mean + self.std * tokens / sigma
        else:
            x0 = analytic(tokens / alpha, sigma / alpha, self.mean, self.std)
        eps_scale, x0_scale = coefficients(self.prediction, alpha, sigma)
        return eps_scale * (tokens - alpha * x0) / sigma + x0_scale * x0


def learned(name, prediction, b, c):
    """Teacher of the data, fake network and generator of ``b + c z``."""
    schedule = make_schedule(name)

    def denoiser(mean, std, generates=False):
        return Denoiser(Independent(name, prediction, mean, std, generates), schedule, prediction)

    student = Generator(denoiser(b, c, True), (4, NUM_VALUES // 4), dtype=torch.float64)
    return Networks(denoiser(MEAN, STD), denoiser(b, c), student)


METHODS = [
    (SiD(alpha=1.2), 1, "edm", "edm"),
    (SiD(alpha=1.0), 1, "cosine", "v"),
    (SiD(alpha=1.0, weighting="karras"), 1, "linear", "eps"),
    (SiD(alpha=0.5, fake_score=FakeScore(LevelDraw("uniform", 0.1, 10.0))), 1, "flow", "flow"),
    (DMD2(adversarial=0.0, fake_adversarial=0.0, levels=LevelDraw("karras", 0.05, 10.0)), 2, "vp", "x0"),
]


@pytest.mark.parametrize(
    ("method", "fake_updates", "name", "prediction"),
    METHODS,
    ids=["sid-edm", "sid-cosine", "sid-linear", "sid-flow", "dmd2-vp"],
)
def test_with_a_fake_network_that_learns(method, fake_updates, name, prediction):
    networks, num_steps, batch = learned(name, prediction, -0.1, 0.8), 250 * fake_updates, 64
    alternation, slots = Alternation(fake_updates), torch.arange(batch)
    models = networks.fake.model, networks.generator.denoiser.model
    optimizers = [torch.optim.Adam(model.parameters(), lr=2e-2, betas=(0.0, 0.99)) for model in models]
    decays = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 250) for optimizer in optimizers]
    distances = []

    def update(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in range(num_steps):
        draw = {"seed": 1, "step": alternation.fake_number(step), "slots": slots}
        update(optimizers[0], method.fake_loss(networks, None, **draw)["loss"])
        if not alternation.trains_generator(step):
            continue
        draw["step"] = alternation.generator_number(step)
        result = method.generator_loss(networks, None, **draw)
        distances.append(result["distance_per_image"].mean().item())
        update(optimizers[1], result["loss"])
        for decay in decays:
            decay.step()
    student = networks.generator.denoiser.model
    assert abs(student.mean.item() - MEAN) < 2e-2 and abs(student.std.item() - STD) < 2e-2
    assert sum(distances[-20:]) < 0.1 * sum(distances[20:40])
