import numpy as np
import pytest
import torch

from maskdm_fast import random
from maskdm_fast.eval import compare, distances, frechet_distance, kernel_distance, subset_indices
from maskdm_fast.eval.features import FeatureNetwork


def _normal(num_rows, width, seed):
    slots = torch.arange(num_rows)
    return random.normal(width, seed=seed, stream=random.Stream.NOISE, step=0, slots=slots, dtype=torch.float64)


class MeanColour(FeatureNetwork):
    """Mean and spread per channel: six features that need no weights."""

    name, kernel_name, num_features, fingerprint = "FD-colour", "KID-colour", 6, "colour"

    def __init__(self):
        super().__init__()
        self.images_seen = 0

    def forward(self, images):
        self.images_seen += len(images)
        x = images.float().flatten(2) / 255
        return torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)


def _images(num_images, seed, shift=0):
    words = random.bits(4 * 4 * 3, seed=seed, stream=random.Stream.NOISE, step=0, slots=torch.arange(num_images))
    return (words % 200 + shift).to(torch.uint8).unflatten(1, (4, 4, 3))


@pytest.mark.parametrize(("num_a", "num_b", "width"), [(300, 200, 8), (10, 12, 24), (2, 40, 16)])
def test_frechet_is_the_formula_also_with_fewer_images_than_features(num_a, num_b, width):
    a = _normal(num_a, width, 1) * torch.linspace(0.5, 2, width) + 3
    b = _normal(num_b, width, 2) @ _normal(width, width, 3)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ covariances[1] @ root)  # symmetric, so safe at low rank
    want = float((a.mean(0) - b.mean(0)).square().sum()) + sum(np.trace(c) for c in covariances)
    want -= 2 * np.sqrt(eigenvalues.clip(0)).sum()
    # Where n < d the null space has eigenvalues of about eps, whose roots are about sqrt(eps).
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-6)


def test_frechet_of_known_gaussians():
    # Same directions, other means and scales: sum (mean difference)^2 + (scale difference)^2, with sample moments.
    z = _normal(50, 4, 1)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov()).T)
    scales, mean = torch.tensor([1.0, 2.0, 3.0, 0.5]).double(), torch.tensor([1.0, 0.0, -2.0, 0.0]).double()
    want = float(mean.square().sum() + (scales - 1).square().sum())
    assert frechet_distance(z * scales + mean, z) == pytest.approx(want, rel=1e-9)
    assert abs(frechet_distance(z, z)) < 1e-9


def test_large_means_do_not_cost_digits():
    a, b = _normal(60, 5, 1), _normal(70, 5, 2)
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")
def test_kernel_distance_equals_torchmetrics_on_one_full_subset():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = _normal(40, 6, 1) + 0.3, _normal(40, 6, 2)
    metric = KernelInceptionDistance(feature=_identity(6), subsets=1, subset_size=40)
    metric.update(a, real=False)
    metric.update(b, real=True)
    with torch.random.fork_rng(devices=[]):
        want = float(metric.compute()[0])
    assert kernel_distance(a, b) == pytest.approx(want, rel=1e-9)


def _identity(width):
    network = torch.nn.Identity()
    network.num_features = width
    return network


def test_kernel_distance_by_loops_unequal_sizes():
    a, b = _normal(5, 3, 1), _normal(7, 3, 2)

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    want = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 20
    want += sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 42
    want -= 2 * sum(k(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(want, rel=1e-12)


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(_normal(20, 4, 2 * i), _normal(30, 4, 2 * i + 1)) for i in range(200)]
    mean, error = np.mean(values), np.std(values) / np.sqrt(len(values))
    assert abs(mean) < 4 * error and min(values) < 0 < max(values)


def test_compare_says_sizes_and_floor():
    network = MeanColour()
    generated, real = _images(30, 1, shift=20), _images(100, 2)
    state = torch.get_rng_state()
    scores = compare(generated, real, network, seed=5)
    assert network.images_seen == 130  # each image once
    assert torch.equal(torch.get_rng_state(), state)
    assert (scores.num_generated, scores.num_reference) == (30, 100)
    assert (scores.floor_num_generated, scores.floor_num_reference) == (30, 70)
    assert scores.fd > 2 * scores.fd_floor > 0
    assert scores.kid > 2 * abs(scores.kid_floor)
    assert str(scores).startswith("FD-colour ") and "KID-colour" in str(scores)
    assert "n = 30 generated against 100 real; floor: 30 real against 70 other real" in str(scores)
    order = subset_indices(100, 100, seed=5)
    features = network(real.permute(0, 3, 1, 2))
    assert scores.fd_floor == pytest.approx(frechet_distance(features[order[:30]], features[order[30:]]), rel=1e-5)
    torch.manual_seed(99)
    assert compare(generated, real, network, seed=5) == scores
    assert compare(generated, real, network, seed=6).fd_floor != scores.fd_floor


def test_compare_takes_features_and_halves_a_small_reference():
    network = MeanColour()
    generated, real = _images(80, 1), _images(50, 2).numpy()
    whole = compare(generated, real, network, seed=0)
    assert (whole.floor_num_generated, whole.floor_num_reference) == (25, 25)
    held = [network(torch.as_tensor(data).permute(0, 3, 1, 2)) for data in (generated, real)]
    network.images_seen = 0
    assert compare(*held, network, seed=0).fd == pytest.approx(whole.fd, rel=1e-4, abs=1e-7)
    assert network.images_seen == 0


def test_subset_indices():
    picked = subset_indices(100, 10, seed=1)
    assert picked.unique().numel() == 10 and torch.equal(subset_indices(100, 20, seed=1)[:10], picked)
    with pytest.raises(ValueError, match=r"count is 101, want 0\.\.100"):
        subset_indices(100, 101, seed=1)


def test_errors():
    good = torch.ones(4, 3)
    for function in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=r"features has shape \[1, 3\]"):
            function(good[:1], good)
        with pytest.raises(ValueError, match="widths 3 and 2"):
            function(good, good[:, :2])
        with pytest.raises(ValueError, match="reference holds values that are not finite"):
            function(good, good / 0)
    with pytest.raises(ValueError, match="1 generated and 4 reference"):
        compare(good[:1], good, MeanColour(), seed=0)


def test_a_floor_is_taken_over_only_where_it_is_the_same(monkeypatch):
    network, reference = MeanColour(), _images(60, 2)
    first = compare(_images(20, 1), reference, network, seed=5)
    calls = []
    for name in ("frechet_distance", "kernel_distance"):
        function = getattr(distances, name)
        monkeypatch.setattr(distances, name, lambda *x, f=function: calls.append(1) or f(*x))
    second = compare(_images(20, 3), reference, network, seed=5, floor=first)
    assert len(calls) == 2 and (second.fd_floor, second.kid_floor) == (first.fd_floor, first.kid_floor)
    assert second.fd != first.fd
    for num_images, seed in ((21, 5), (20, 6)):
        other = compare(_images(num_images, 1), reference, network, seed=seed, floor=first)
        assert other == compare(_images(num_images, 1), reference, network, seed=seed)
