"""The closed forms of score distillation on Gaussian data, through the whole of both losses.

Data N(m, V), generator ``b + C z``, s = sigma/alpha, ``R = s^2 (Cov + s^2)^{-1}`` for each of the two.
"""

import pytest
import torch

from maskdm_fast.diffusion import Denoiser, make_schedule
from maskdm_fast.distill import DMD2, FakeScore, SiD
from tests.distill.score_toys import ALL, GaussianNetwork, gaussian_networks, narrow, quadrature

ALPHAS = [0.0, 0.5, 1.0, 1.2]
# alpha -> d/db, d/dc and the value, for m = .3, v = .25, b = -.5, c = 1, s = .7
NUMBERS = {
    0.0: (-0.52733, 0.44140, 0.44614),
    0.5: (-0.35077, 0.33031, 0.22307),
    1.0: (-0.17421, 0.21922, 0.0),
    1.2: (-0.10358, 0.17478, -0.08923),
}


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def scalar_toy(name, prediction, b=-0.5, c=1.0):
    return gaussian_networks(name, prediction, values(0.3), values([0.25]), values(b), values([c]))


def matrix_toy(name, prediction):
    mean, b = values(0.3, -0.2), values(-0.5, 0.1)
    cov, c = values([0.25, 0.1], [0.1, 0.4]), values([0.9, 0.2], [-0.1, 0.5])
    return gaussian_networks(name, prediction, mean, cov, b, c)


def shrinkage(cov, s):
    return s**2 * torch.linalg.inv(cov + s**2 * torch.eye(len(cov), dtype=torch.float64))


def level_of(networks, t):
    alpha, sigma = networks.teacher.schedule.alpha_sigma(t[:1])
    return sigma.double() / alpha.double()


def run(method, networks, monkeypatch):
    """The loss, the gradients of b and C, and the noise level."""
    with quadrature(monkeypatch, networks.generator.token_shape[1]) as draw:
        result = method.generator_loss(networks, None, **draw)
    result["loss"].backward()
    model = networks.generator.denoiser.model
    return result["loss"].detach(), model.mean.grad, model.cov.grad, level_of(networks, result["t"])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_numbers(alpha, monkeypatch):
    method = SiD(alpha=alpha, weighting="none", scale=1.0, levels=narrow(0.7))
    value, grad_b, grad_c, s = run(method, scalar_toy("edm", "edm"), monkeypatch)
    assert s.item() == pytest.approx(0.7, rel=1e-6)
    torch.testing.assert_close((grad_b.item(), grad_c.item(), value.item()), NUMBERS[alpha], rtol=0, atol=6e-6)


@pytest.mark.parametrize(("name", "prediction"), ALL)
def test_value_and_gradient_of_every_teacher(name, prediction, monkeypatch):
    """T3 and T4 in their matrix form: dL/db = -(2(1-a) R - (1-2a) Q) R (m-b), dL/dC = -(M R + R M + 2a M^2) C with R of
    the data, Q of the generator and M = Q - R; and value (1-a) E|d|^2."""
    for alpha in ALPHAS:
        for level in (0.3, 0.7, 3.0):
            networks = matrix_toy(name, prediction)
            teacher, student = networks.teacher.model, networks.generator.denoiser.model
            method = SiD(alpha=alpha, weighting="none", scale=1.0, levels=narrow(level))
            value, grad_b, grad_c, s = run(method, networks, monkeypatch)
            c, gap = student.cov.detach(), (teacher.mean - student.mean).detach()
            of_data, of_student = shrinkage(teacher.cov.detach(), s), shrinkage(c @ c.T, s)
            m = of_student - of_data
            want_b = -(2 * (1 - alpha) * of_data - (1 - 2 * alpha) * of_student) @ of_data @ gap
            want_c = -(m @ of_data + of_data @ m + 2 * alpha * m @ m) @ c
            distance = (of_data @ gap).square().sum() + (m @ m @ (c @ c.T + s**2 * torch.eye(2))).trace()
            # alpha_t and sigma_t are float32.
            torch.testing.assert_close(grad_b, want_b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad_c, want_c, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(value, (1 - alpha) * distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "prediction"), ALL)
def test_distribution_matching_of_every_teacher(name, prediction, monkeypatch):
    """dL/db = -R (m - b), dL/dC = -(Q - R) C: s^2 times the gradient of KL(generator, data) of the noisy images."""
    networks = matrix_toy(name, prediction)
    teacher, student = networks.teacher.model, networks.generator.denoiser.model
    method = DMD2(weighting="none", levels=narrow(0.7), adversarial=0.0, fake_adversarial=0.0)
    _, grad_b, grad_c, s = run(method, networks, monkeypatch)
    c, gap = student.cov.detach(), (teacher.mean - student.mean).detach()
    of_data, of_student = shrinkage(teacher.cov.detach(), s), shrinkage(c @ c.T, s)
    # The loss is the mean over the two values.
    torch.testing.assert_close(2 * grad_b, -of_data @ gap, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * grad_c, -(of_student - of_data) @ c, rtol=1e-5, atol=1e-6)

    def divergence(b, c):
        noisy, of_noisy_data = (cov + s**2 * torch.eye(2) for cov in (c @ c.T, teacher.cov.detach()))
        gap = teacher.mean.detach() - b
        inverse = torch.linalg.inv(of_noisy_data)
        return 0.5 * ((inverse @ noisy).trace() + gap @ inverse @ gap - noisy.logdet())

    b, c = student.mean.detach().requires_grad_(), c.requires_grad_()
    (s.square() * divergence(b, c)).backward()
    torch.testing.assert_close(2 * grad_b, b.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(2 * grad_c, c.grad, rtol=1e-5, atol=1e-6)


def test_half_is_half_the_gradient_of_the_fisher_divergence(monkeypatch):
    s = 0.7
    _, grad_b, grad_c, _ = run(
        SiD(alpha=0.5, weighting="none", scale=1.0, levels=narrow(s)), matrix_toy("edm", "edm"), monkeypatch
    )
    networks = matrix_toy("edm", "edm")
    teacher = networks.teacher.model
    b, c = (parameter.detach().requires_grad_() for parameter in networks.generator.denoiser.model.parameters())
    of_data, of_student = shrinkage(teacher.cov.detach(), s), shrinkage(c @ c.T, s)
    noisy = c @ c.T + s**2 * torch.eye(2)
    m = of_student - of_data
    fisher = (of_data @ (teacher.mean.detach() - b)).square().sum() + (m @ m @ noisy).trace()
    (0.5 * fisher).backward()
    torch.testing.assert_close((grad_b, grad_c), (b.grad, c.grad), rtol=1e-5, atol=1e-6)


def of_mean_and_width(method, monkeypatch, c):
    """The two gradients of the scalar toy, whose mean has to grow and whose width has to become 1/2."""
    return torch.cat([grad.flatten() for grad in run(method, scalar_toy("edm", "edm", c=c), monkeypatch)[1:3]])


@pytest.mark.parametrize(
    ("s", "c", "right"),
    [(0.3, 0.1, [False, True, True, True]), (0.7, 4.0, [True, True, True, False]), (0.7, 0.8, [True] * 4)],
)
def test_alpha_decides_whether_the_mean_moves_to_the_data(s, c, right, monkeypatch):
    """It does iff 2(1-a) r > (1-2a) q: not for a = 0 and a narrow generator (q > 2r), nor for a = 1.2 and a wide one
    (r > 3.5 q)."""
    methods = [SiD(alpha=alpha, weighting="none", scale=1.0, levels=narrow(s)) for alpha in ALPHAS]
    assert [of_mean_and_width(method, monkeypatch, c)[0].item() < 0 for method in methods] == right


def test_the_plug_in_distance_alone_collapses(monkeypatch):
    """Descent on E|d|^2 alone shrinks the generator and, once it is too narrow, moves its mean away."""
    first, second = (SiD(alpha=alpha, weighting="none", scale=1.0, levels=narrow(0.7)) for alpha in (0.0, 1.0))
    for c in (0.2, 1.0):
        # L_a = L_0 - a |d|^2
        of_mean, of_width = of_mean_and_width(first, monkeypatch, c) - of_mean_and_width(second, monkeypatch, c)
        assert of_width > 0
        assert (of_mean > 0) == (c**2 < 0.25)


@pytest.mark.parametrize(("name", "prediction"), ALL)
def test_tweedie(name, prediction):
    """T0: (alpha f - xt) / sigma^2 is the score of the noisy data."""
    schedule = make_schedule(name)
    mean, cov = values(0.3, -0.2), values([0.25, 0.1], [0.1, 0.4])
    denoiser = Denoiser(GaussianNetwork(name, prediction, mean, cov), schedule, prediction)
    t = schedule.nearest_timesteps(values(0.5)).expand(1)
    alpha, sigma = (scale.double() for scale in schedule.alpha_sigma(t))
    xt = values([[0.4, -1.0]]).requires_grad_()
    noisy = torch.distributions.MultivariateNormal(alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(2))
    (score,) = torch.autograd.grad(noisy.log_prob(xt[0]).sum(), xt)
    with torch.no_grad():
        torch.testing.assert_close((alpha * denoiser(xt[None], t)[0] - xt) / sigma**2, score, rtol=1e-4, atol=1e-5)


def test_least_loss_of_the_fake_network(monkeypatch):
    """E|f* - x_g|^2 = c^2 s^2 / (c^2 + s^2) a value, and any other fake network has more."""
    s = torch.tensor(0.7, dtype=torch.float64)
    method = SiD(fake_score=FakeScore(levels=narrow(0.7)))

    def loss(b, c):
        networks = scalar_toy("edm", "edm")
        with torch.no_grad():
            networks.fake.model.mean.fill_(b)
            networks.fake.model.cov.fill_(c**2)
        with quadrature(monkeypatch, 1) as draw:
            result = method.fake_loss(networks, None, **draw)
        result["loss"].backward()
        return result["loss"].item() / (1 / s**2 + 4).item(), networks.fake.model

    least, model = loss(-0.5, 1.0)
    assert least == pytest.approx((s**2 / (1 + s**2)).item(), rel=1e-5)
    torch.testing.assert_close((model.mean.grad, model.cov.grad), (values(0.0), values([0.0])), rtol=0, atol=1e-5)
    assert loss(-0.4, 1.0)[0] > least + 1e-4 and loss(-0.5, 1.1)[0] > least + 1e-4


def test_projection_of_the_score():
    """T2: E[u(xt) (f*(xt) - x_g)] = 0 for any u; another f fails."""
    generator, num = torch.Generator().manual_seed(0), 1_000_000
    z, eps = torch.randn(2, num, 1, 1, generator=generator, dtype=torch.float64)
    schedule = make_schedule("vp")
    t = schedule.t_of_log_snr(values(-0.7))
    alpha, sigma = (scale.double() for scale in schedule.alpha_sigma(t))
    x_g = -0.5 + 0.8 * z
    xt = alpha * x_g + sigma * eps
    fake = Denoiser(GaussianNetwork("vp", "v", values(-0.5), values([0.64])), schedule, "v")
    with torch.no_grad():
        error = fake(xt, t.expand(num)) - x_g

    def is_zero(values):
        return abs(values.mean()) < 4 * values.std() / num**0.5

    for u in (torch.ones_like, lambda x: x, torch.sin, lambda x: torch.tanh(3 * x)):
        assert is_zero(u(xt) * error)
    assert not is_zero(error + 0.1)
