"""sid_loss against autograd, against its identities, and what it does with images that are not finite."""

import pytest
import torch

from maskdm_fast import ops
from maskdm_fast.ops.sid_loss import cases
from maskdm_fast.testing import draw

SHAPE = (3, 4, 5)
BACKENDS = ("reference", "cpu")
WEIGHTINGS = ("l1", "l1_xt", "karras", "none")
ALPHAS = (0.0, 0.5, 1.0, 1.2)


def inputs_of(weighting, alpha=1.2, dtype=torch.float64, **changes):
    case = cases.Case("test", SHAPE, weighting=weighting, alpha=alpha, reduction="none", **changes)
    inputs = cases.make_inputs(case, dtype, "cpu", seed=7)
    for name in cases.WITH_GRAD:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return inputs


def as_published(generated, teacher, fake, weight, alpha, weighting, xt, alpha_t, sigma_t, sigma_data=0.5):
    """``[B]``, with autograd: the elements of the generator's loss in the order of the official code."""
    level = alpha_t[:, None, None]
    with torch.no_grad():
        if weighting == "l1":
            size = (generated - teacher).abs().mean(dim=(1, 2)).clip(min=1e-5)
        elif weighting == "l1_xt":
            size = (xt / level - teacher).abs().mean(dim=(1, 2)).clip(min=1e-5)
        elif weighting == "karras":
            sigma = sigma_t / alpha_t
            size = (sigma * sigma_data).square() / (sigma.square() + sigma_data**2)
        else:
            size = torch.ones_like(alpha_t)
    elements = (teacher - fake) * ((teacher - generated) - alpha * (teacher - fake))
    return weight * (elements / size[:, None, None]).mean(dim=(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_are_those_of_autograd(weighting, alpha, backend):
    inputs = inputs_of(weighting, alpha)
    leaves = [inputs[name] for name in cases.WITH_GRAD]
    upstream = draw((SHAPE[0],), torch.float64, "cpu", seed=8)
    loss = ops.sid_loss(**inputs, backend=backend)
    published = as_published(**{name: value for name, value in inputs.items() if name != "reduction"})
    torch.testing.assert_close(loss, published, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss, leaves, upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(published, leaves, upstream), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(grads[:3]), torch.zeros(SHAPE, dtype=torch.float64), rtol=0, atol=1e-12)
    mean = ops.sid_loss(**inputs | {"reduction": "mean"}, backend=backend)
    torch.testing.assert_close(mean, loss.mean())
    torch.testing.assert_close(torch.autograd.grad(mean, leaves[:1])[0] * SHAPE[0], grads[0] / upstream[:, None, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_identities_of_alpha(backend):
    """``L_1/2`` is half the teacher's minus half the fake network's error; ``L_a - L_b`` is ``(b - a) |d|^2``."""

    def loss(alpha):
        return ops.sid_loss(**inputs_of("none", alpha, weighted=False), backend=backend)

    given = inputs_of("none", weighted=False)
    errors = [(given[name] - given["generated"]).square().mean(dim=(1, 2)) for name in ("teacher", "fake")]
    distance = (given["teacher"] - given["fake"]).square().mean(dim=(1, 2))
    torch.testing.assert_close(loss(0.5), 0.5 * (errors[0] - errors[1]))
    torch.testing.assert_close(loss(0.2) - loss(1.2), distance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_networks_have_no_loss(backend):
    """Where the fake score is the teacher, as at the start, loss and the sum of what reaches xt are 0 for any alpha."""
    for weighting in WEIGHTINGS:
        inputs = inputs_of(weighting, dtype=torch.float32)
        inputs["fake"] = inputs["teacher"].detach().clone().requires_grad_()
        loss = ops.sid_loss(**inputs, backend=backend)
        assert (loss == 0).all()
        leaves = [inputs[name] for name in ("generated", "teacher", "fake")]
        to_generated, to_teacher, to_fake = torch.autograd.grad(loss.sum(), leaves)
        assert (to_generated == 0).all() and torch.equal(to_teacher, -to_fake) and to_fake.abs().max() > 0.01


@pytest.mark.parametrize("weighting", ["l1_xt", "karras"])
def test_noise_levels_count_by_their_ratio(weighting):
    """A variance-preserving level is the variance-exploding one of ``xt / alpha_t`` and ``sigma_t / alpha_t``."""
    preserving = inputs_of(weighting)
    ratio = {"xt": preserving["xt"].detach() / preserving["alpha_t"][:, None, None], "alpha_t": None}
    exploding = preserving | ratio | {"sigma_t": preserving["sigma_t"] / preserving["alpha_t"]}
    torch.testing.assert_close(ops.sid_loss(**exploding), ops.sid_loss(**preserving), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["generated", "teacher", "fake"])
def test_an_image_that_is_not_finite_counts_as_nothing(name, value, weighting, backend):
    given = inputs_of(weighting, dtype=torch.float32)
    leaves = [given[key] for key in cases.WITH_GRAD]
    losses = ops.sid_loss(**given, backend=backend)
    kept = torch.tensor([1.0, 0.0, 1.0])
    wanted = torch.autograd.grad(losses, leaves, kept / 3)
    spoilt = given | {key: given[key].detach().clone().requires_grad_() for key in cases.WITH_GRAD}
    with torch.no_grad():
        spoilt[name][1, 2, 3] = value
    leaves = [spoilt[key] for key in cases.WITH_GRAD]
    mean = ops.sid_loss(**spoilt | {"reduction": "mean"}, backend=backend)
    torch.testing.assert_close(mean, (losses * kept).sum() / 3)
    for grad, want in zip(torch.autograd.grad(mean, leaves), wanted, strict=True):
        torch.testing.assert_close(grad, want)
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_otherwise_shows(backend):
    """A weight, and a gradient from above, are none of the images' business."""
    given = inputs_of("l1", dtype=torch.float32)
    given["weight"] = torch.tensor([1.0, float("nan"), 1.0])
    assert ops.sid_loss(**given, backend=backend).isnan().tolist() == [False, True, False]
    given["weight"] = None
    loss = ops.sid_loss(**given, backend=backend)
    (grad,) = torch.autograd.grad(loss, given["fake"], torch.tensor([1.0, float("inf"), 1.0]))
    assert grad.isfinite().all(dim=2).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_normaliser_has_a_floor(backend):
    generated = torch.zeros(2, 8)
    teacher = torch.tensor([[0.0], [4e-6]]).expand(2, 8)
    loss = ops.sid_loss(generated, teacher, teacher - 1.0, alpha=1.0, reduction="none", backend=backend)
    torch.testing.assert_close(loss, torch.tensor([-1e5, (4e-6 - 1.0) / 1e-5]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_detached_estimates_give_distribution_matching(backend, monkeypatch):
    """The generator then gets DMD2's gradient, (fake - teacher) / mean |generated - teacher|, and no other is made."""
    wanted = []
    implementation = ops.IMPLEMENTATIONS["sid_loss"][backend]
    backward = implementation.backward
    monkeypatch.setattr(implementation, "backward", lambda *args: wanted.append(args[-3:]) or backward(*args))
    given = inputs_of("l1", weighted=False) | {"reduction": "mean"}
    given |= {name: given[name].detach() for name in ("teacher", "fake")}
    ops.sid_loss(**given, backend=backend).backward()
    size = (given["generated"] - given["teacher"]).detach().abs().mean(dim=(1, 2), keepdim=True)
    of_dmd2 = (given["fake"] - given["teacher"]) / size / given["generated"].numel()
    torch.testing.assert_close(given["generated"].grad, of_dmd2, rtol=1e-12, atol=1e-12)
    assert wanted == [(True, False, False)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("teacher",), ("fake",), ("generated", "fake"), ("weight",)])
def test_each_gradient_alone_is_the_same(names, backend):
    given = inputs_of("l1", dtype=torch.float32)
    together = torch.autograd.grad(ops.sid_loss(**given, backend=backend).sum(), [given[name] for name in names])
    alone = given | {name: given[name].detach() for name in cases.WITH_GRAD if name not in names}
    alone = torch.autograd.grad(ops.sid_loss(**alone, backend=backend).sum(), [alone[name] for name in names])
    assert all(map(torch.equal, together, alone))


def test_the_sum_of_many_values_is_accurate():
    """300,000 equal values, in float32 one after another, would be off by a thousandth."""
    generated, teacher = torch.zeros(1, 300_000), torch.full((1, 300_000), 0.1)
    loss = ops.sid_loss(generated, teacher, generated, alpha=0.5, weighting="none")
    assert abs(loss.double() / (0.5 * torch.tensor(0.1).double().square()) - 1) < 1e-7


def test_the_mean_over_no_images_is_nan():
    none = torch.zeros(0, 3, 4)
    for backend in BACKENDS:
        assert ops.sid_loss(none, none, none, backend=backend).isnan()


def test_compiles_where_some_gradients_are_not_wanted():
    torch._dynamo.reset()
    given = inputs_of("l1_xt", dtype=torch.float32) | {"weight": None, "reduction": "mean"}
    given["teacher"] = given["teacher"].detach()
    compiled = torch.compile(ops.sid_loss, fullgraph=True, backend="aot_eager")
    leaves = given["generated"], given["fake"]
    results = []
    for function in (ops.sid_loss, compiled):
        loss = function(**given)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *results))
