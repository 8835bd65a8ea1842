import pytest
import torch

from maskdm_fast import random
from maskdm_fast.eval import class_scores, kernel_distance, nearest, real_nearest
from maskdm_fast.eval.distances import kernel_distances_of_splits

_NAMES = ("round", "square", "rare", "absent")


def _normal(num_rows, width, seed):
    slots = torch.arange(num_rows)
    return random.normal(width, seed=seed, stream=random.Stream.NOISE, step=0, slots=slots, dtype=torch.float64)


def _score(a, labels, b, reference_labels):
    chosen = torch.arange(len(b))
    scores = class_scores(
        a,
        labels,
        b,
        reference_labels,
        nearest=nearest(a, b, None, k=1).indices[:, 0],
        real_nearest=real_nearest(b, chosen).indices[:, 0],
        real_chosen=chosen,
        class_names=_NAMES,
        seed=0,
    )
    return {score.name: score for score in scores}


def test_splits_equal_the_distance_computed_one_by_one(monkeypatch):
    monkeypatch.setattr("maskdm_fast.eval.distances._ROWS", 4)
    x = _normal(11, 5, 1)
    first = torch.zeros(3, 11, dtype=torch.bool)
    for row, chosen in zip(first, ([0, 1], [3, 9, 10, 4], [2, 3, 5, 7, 8, 9]), strict=True):
        row[chosen] = True
    want = [kernel_distance(x[row], x[~row]) for row in first]
    assert kernel_distances_of_splits(x, first).tolist() == pytest.approx(want, rel=1e-10)


def test_classes_drawn_well_badly_and_as_each_other():
    directions = 6 * _normal(2, 12, 5)
    reference_labels = torch.arange(90) % 2
    reference_labels[88:] = 2
    real = directions[reference_labels.clamp(max=1)] + _normal(90, 12, 1)
    real[88:] = 20 * _normal(2, 12, 6)
    labels = torch.arange(60) % 2
    drawn = directions[labels] + _normal(60, 12, 2)
    good = _score(drawn, labels, real, reference_labels)
    assert list(good) == ["round", "square", "rare"]  # no image of "absent" on either side
    for name in ("round", "square"):
        score = good[name]
        assert (score.num_generated, score.num_reference) == (30, 44)
        assert score.agreement == score.agreement_real == 1.0
        assert abs(score.kid) < 3 * score.kid_spread
    rare = good["rare"]
    assert (rare.num_generated, rare.num_reference) == (0, 2)
    assert rare.agreement is None and rare.kid is None and rare.kid_spread is None

    swapped = _score(drawn, 1 - labels, real, reference_labels)
    assert swapped["round"].agreement == 0.0
    assert swapped["round"].kid > 10 * swapped["round"].kid_spread
    shifted = drawn + 1.5 * (labels[:, None] == 0)
    scores = _score(shifted, labels, real, reference_labels)
    assert scores["round"].kid > 5 * scores["round"].kid_spread
    assert abs(scores["square"].kid) < 3 * scores["square"].kid_spread


def test_spread_is_that_of_real_draws():
    """The spread told of one set of real images is what independent sets of that size really show."""
    draws = [_normal(120, 6, seed) for seed in range(60)]
    values = [kernel_distance(x[:40], x[40:]) for x in draws]
    real = torch.tensor(values).square().mean().sqrt()
    zeros = torch.zeros(120, dtype=torch.int64)
    told = [_score(x[:40], zeros[:40], x, zeros)["round"].kid_spread for x in draws[:5]]
    assert torch.tensor(told).mean() == pytest.approx(float(real), rel=0.5)
