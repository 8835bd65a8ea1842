import math

import pytest
import torch

from maskdm_fast import random
from maskdm_fast.eval import manifold, pairs
from maskdm_fast.eval.pairs import nearest_rows, squared_distances


def _normal(num_rows, width, seed):
    slots = torch.arange(num_rows)
    return random.normal(width, seed=seed, stream=random.Stream.NOISE, step=0, slots=slots, dtype=torch.float64)


def _by_loops(a, b, k_precision, k_density):
    def radius(x, i, k):
        return sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)[k - 1]

    def distance(i, j):
        return float((a[i] - b[j]).norm())

    n, m = range(len(a)), range(len(b))
    near, wide = ([radius(b, j, k) for j in m] for k in (k_precision, k_density))
    drawn = [radius(a, i, k_precision) for i in n]
    precision = sum(any(distance(i, j) <= near[j] for j in m) for i in n) / len(a)
    recall = sum(any(distance(i, j) <= drawn[i] for i in n) for j in m) / len(b)
    density = sum(sum(distance(i, j) <= wide[j] for j in m) for i in n) / (k_density * len(a))
    coverage = sum(any(distance(i, j) <= wide[j] for i in n) for j in m) / len(b)
    return precision, recall, density, coverage


def _values(scores):
    return scores.precision, scores.recall, scores.density, scores.coverage


@pytest.mark.parametrize(("num_a", "num_b", "k"), [(9, 13, (3, 5)), (20, 8, (1, 2)), (7, 7, (2, 2))])
def test_definitions_by_loops(num_a, num_b, k, monkeypatch):
    monkeypatch.setattr(pairs, "_PAIRS", 30)  # several pieces, the last one smaller
    a, b = _normal(num_a, 3, 1) * 1.5 + 0.3, _normal(num_b, 3, 2)
    scores = manifold(a, b, precision_neighbours=k[0], density_neighbours=k[1])
    assert _values(scores) == pytest.approx(_by_loops(a, b, *k))


def test_known_values_on_a_line():
    # Real images at 0, 1, 2, 3: with k = 1 every ball has radius 1, and they cover [-1, 4].
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    drawn = torch.tensor([[-1.0], [4.5], [1.5], [1.75]])  # radii of the drawn: 2.5, 2.75, 0.25, 0.25
    scores = manifold(drawn, real, precision_neighbours=1, density_neighbours=1)
    assert scores.precision == 3 / 4
    assert scores.recall == 4 / 4  # 0 and 1 from -1, 2 and 3 from 4.5
    assert scores.density == (1 + 0 + 2 + 2) / 4
    assert scores.coverage == 3 / 4  # 3 is in no reach: its ball ends at 2 and 4


def test_what_each_score_sees():
    """Four modes: two of them dropped, each narrowed, each widened, against as many real images."""
    corners = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0], [40.0, 40.0]], dtype=torch.float64)
    lift = _normal(2, 16, 9)

    def draw(seed, num_modes=4, spread=1.0):
        return corners[torch.arange(400) % num_modes] @ lift + spread * _normal(400, 16, seed)

    real = draw(0)
    same, dropped, narrow, wide = (
        manifold(x, real) for x in (draw(1), draw(2, num_modes=2), draw(3, spread=0.5), draw(4, spread=3.0))
    )
    # Halves of one distribution: high, not 1.
    assert 0.7 < same.precision < 1 and 0.7 < same.recall < 1
    assert same.density == pytest.approx(1, abs=0.15) and same.coverage > 0.9
    # Two of four modes missing: half of the reference is not reached, what is drawn is as good as before.
    assert dropped.recall < 0.55 and dropped.coverage < 0.55
    assert dropped.precision > same.precision - 0.1 and dropped.density > 0.85
    # Too little variety within each mode: precise, without recall.
    assert narrow.precision > 0.98 and narrow.recall < 0.3 and narrow.density > 1.5
    # Too much noise: the reverse.
    assert wide.precision < 0.1 and wide.recall > 0.9 and wide.density < 0.1 and wide.coverage < 0.2


def test_coverage_resists_outliers_that_raise_recall():
    real = _normal(200, 8, 1)
    good = real[:20] + 0.01 * _normal(20, 8, 2)
    outliers = 30 * _normal(4, 8, 3)  # their balls, as wide as they are far, take in nearly everything
    scores = manifold(torch.cat([good, outliers]), real)
    assert scores.recall > 0.9 and scores.coverage < 0.5


def test_nearest_rows_finds_copies_at_exactly_zero_far_from_the_origin():
    y = _normal(300, 40, 1).float() + 1000
    x = y[[7, 250]] + torch.tensor([[0.0], [1e-3]])
    found = nearest_rows(x, y, 3)
    assert found.indices[:, 0].tolist() == [7, 250]
    assert found.distances[0, 0] == 0
    assert found.distances[1, 0] == pytest.approx(float((x[1].double() - y[250].double()).norm()), rel=1e-12)
    want = (x[:, None].double() - y[None].double()).norm(dim=2).sort(dim=1).values[:, :3]
    torch.testing.assert_close(found.distances, want)


def test_own_rows_are_passed_over():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    found = nearest_rows(x, x, 2, own=torch.arange(3))
    assert found.indices.tolist() == [[1, 2], [0, 2], [1, 0]]
    assert found.distances.tolist() == [[1, 3], [1, 2], [2, 3]]


def test_squared_distances_in_pieces(monkeypatch):
    monkeypatch.setattr(pairs, "_PAIRS", 25)
    x, y = _normal(23, 6, 1), _normal(11, 6, 2)
    pieces = list(squared_distances(x, y))
    assert len(pieces) == math.ceil(23 / 2) and pieces[-1][0] == slice(22, 23)
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces]).sqrt(), torch.cdist(x, y))


def test_errors():
    with pytest.raises(ValueError, match="3 generated images, want more than the number of neighbours, 3"):
        manifold(_normal(3, 2, 1), _normal(9, 2, 2))
    with pytest.raises(ValueError, match="5 reference images, want more than the number of neighbours, 5"):
        manifold(_normal(9, 2, 1), _normal(5, 2, 2))
    with pytest.raises(ValueError, match=r"k is 3, want 1\.\.2, the number of images"):
        nearest_rows(_normal(3, 2, 1), _normal(3, 2, 1), 3, own=torch.arange(3))
