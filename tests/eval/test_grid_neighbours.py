import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast import random
from maskdm_fast.eval import Neighbours, copying, make_grid, nearest, neighbours_grid, real_nearest, save_grid


def _solid(num_images, channels=3):
    return torch.arange(num_images, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 6, channels)


def test_grid_places_images_row_by_row():
    grid = make_grid(_solid(5), columns=3, padding=1)
    assert grid.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    assert [grid[1 + 5 * row, 1 + 7 * column, 0] for row in range(2) for column in range(3)] == [0, 1, 2, 3, 4, 224]
    assert (grid[0] == 224).all() and (grid[:, 7] == 224).all()
    assert make_grid(_solid(5)).shape[1] == 3 * 8 + 2


@pytest.mark.parametrize("channels", [1, 3])
def test_save_grid(tmp_path, channels):
    save_grid(_solid(4, channels), tmp_path / "new" / "grid.png", scale=3)
    with Image.open(tmp_path / "new" / "grid.png") as image:
        array = np.asarray(image.convert("RGB"))
    assert np.array_equal(array[::3, ::3], make_grid(_solid(4)))


def test_grid_errors():
    with pytest.raises(TypeError, match="float32, want uint8"):
        make_grid(_solid(2).float())
    with pytest.raises(ValueError, match=r"\[0, 4, 6, 3\]"):
        make_grid(_solid(0))
    with pytest.raises(ValueError, match="columns is 0"):
        make_grid(_solid(2), columns=0)


def test_nearest_pixels_finds_copies_and_orders():
    reference = (torch.arange(12 * 48) * 91 % 256).to(torch.uint8).reshape(12, 4, 4, 3)
    samples = reference[[7, 2]].clone()
    samples[1, 0, 0, 0] ^= 4
    found = nearest(samples, reference.numpy(), "pixels", k=12)
    assert found.indices[:, 0].tolist() == [7, 2]
    assert found.distances[0, 0] == 0 and (found.distances.diff(dim=1) >= 0).all()
    assert found.distances[1, 0] == pytest.approx(4 / 255 / 48**0.5, rel=1e-4)
    want = ((samples[:, None].float() - reference[None].float()) / 255).square().mean(dim=(2, 3, 4)).sqrt()
    torch.testing.assert_close(found.distances, want.sort(dim=1).values)


def test_nearest_features_is_cosine():
    samples, reference = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 5.0], [9.0, 0.0]])
    found = nearest(samples, reference, network=None, k=3)
    assert found.indices.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(found.distances, torch.tensor([[0.0, 1 - 0.5**0.5, 1.0]]))


def test_nearest_errors():
    with pytest.raises(ValueError, match=r"k is 5, want 1\.\.4"):
        nearest(_solid(2), _solid(4), "pixels", k=5)
    with pytest.raises(ValueError, match="72 values each, the reference 24"):
        nearest(_solid(2), _solid(4, 1), "pixels", k=1)


def _spread(num_rows, seed):
    slots = torch.arange(num_rows)
    return random.normal(6, seed=seed, stream=random.Stream.NOISE, step=0, slots=slots)


def test_copying_tells_copies_from_new_images():
    train = _spread(400, 1)
    real = real_nearest(train, torch.arange(400)).distances[:, 0]

    def hint(samples):
        return copying(nearest(samples, train, None, k=1).distances[:, 0], real)

    new = hint(_spread(300, 2))
    assert new.closer == pytest.approx(0.5, abs=0.06) and new.near_copies < 0.03 and new.num_real == 400
    copies = hint(train[:300] * 1.01)
    assert copies.closer == 1.0 and copies.near_copies == 1.0
    mixed = hint(torch.cat([train[:60], _spread(240, 2)]))  # a fifth is copied: the mean moves little, the share shows
    assert mixed.closer == pytest.approx(0.6, abs=0.06) and mixed.near_copies == pytest.approx(0.2, abs=0.03)


def test_copying_by_loops_with_ties():
    samples, real = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5, 4.0, 3.0])
    pairs = [(s < r) + 0.5 * (s == r) for s in samples.tolist() for r in real.tolist()]
    assert copying(samples, real).closer == pytest.approx(sum(pairs) / 15)


def test_real_nearest_passes_over_the_image_itself():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 2.0]])
    found = real_nearest(reference, torch.tensor([3, 0]))
    assert found.indices.tolist() == [[2], [1]]
    torch.testing.assert_close(found.distances, torch.tensor([[0.0], [1 - 1 / 1.01**0.5]]), atol=1e-6, rtol=0)


def test_neighbours_grid_shows_the_nearest_first_and_mixes_grey_with_colour():
    samples, reference = _solid(3, channels=1), _solid(5) + 100
    found = Neighbours(torch.tensor([[4, 3], [0, 1], [2, 0]]), torch.tensor([[0.3, 0.4], [0.1, 0.2], [0.2, 0.5]]))
    grid = neighbours_grid(samples, reference, found, num_rows=2)
    assert grid.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    cells = [[grid[2 + 6 * row, 2 + 8 * column].tolist() for column in range(3)] for row in range(2)]
    assert cells == [[[1] * 3, [100] * 3, [101] * 3], [[2] * 3, [102] * 3, [100] * 3]]
