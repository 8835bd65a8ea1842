import pytest
import torch

from maskdm_fast.data import DataOrder


def test_every_image_once_per_epoch_and_epochs_differ():
    order = DataOrder(101, seed=3)
    epochs = [order.indices(101 * epoch, 101) for epoch in range(3)]
    for epoch in epochs:
        assert epoch.dtype == torch.int64
        assert torch.equal(epoch.sort().values, torch.arange(101))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.arange(101))


@pytest.mark.parametrize("batch", [1, 7, 10, 64])
def test_batches_straddle_epochs_and_do_not_depend_on_their_size(batch):
    whole = DataOrder(10, seed=0).indices(0, 64)
    order = DataOrder(10, seed=0)
    parts = [order.indices(start, min(batch, 64 - start)) for start in range(0, 64, batch)]
    assert torch.equal(torch.cat(parts), whole)


def test_order_depends_on_seed_only():
    torch.manual_seed(0)
    first = DataOrder(50, seed=1).indices(73, 20)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(DataOrder(50, seed=1).indices(73, 20), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(DataOrder(50, seed=2).indices(73, 20), first)


def test_one_image_and_empty_batch():
    assert DataOrder(1, seed=0).indices(5, 3).tolist() == [0, 0, 0]
    assert DataOrder(4, seed=0).indices(5, 0).shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="num_images is 0"):
        DataOrder(0, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        DataOrder(3, seed=-1)
    with pytest.raises(ValueError, match="position is -1"):
        DataOrder(3, seed=0).indices(-1, 2)


LABELS = torch.tensor([0] * 70 + [1] * 20 + [3] * 9 + [4])  # long-tailed, and nothing has label 2


@pytest.mark.parametrize("class_balance", [0.3, 0.5, 1.0])
def test_balanced_classes_and_images_are_as_frequent_as_they_should(class_balance):
    """In each epoch the expectation rounded down or up, for classes and for images; over many the expectation."""
    order = DataOrder(100, seed=5, labels=LABELS, class_balance=class_balance)
    sizes = torch.tensor([70.0, 20.0, 0.0, 9.0, 1.0], dtype=torch.float64)
    shares = torch.where(sizes > 0, sizes ** (1 - class_balance), 0.0)
    per_class = 100 * shares / shares.sum()
    per_image = (per_class / sizes)[LABELS]
    epochs = torch.stack([order.indices(100 * epoch, 100) for epoch in range(200)])
    for epoch in epochs:
        assert ((LABELS[epoch].bincount(minlength=5) - per_class).abs() < 1 + 1e-9).all()
        assert ((epoch.bincount(minlength=100) - per_image).abs() < 1 + 1e-9).all()
    # A count per epoch is one of two neighbours, so its mean over 200 has a deviation of at most 0.5 / sqrt(200).
    assert ((LABELS[epochs.flatten()].bincount(minlength=5) / 200 - per_class).abs() < 5 * 0.5 / 200**0.5).all()
    assert ((epochs.flatten().bincount(minlength=100) / 200 - per_image).abs() < 5 * 0.5 / 200**0.5).all()


def test_balance_mixes_the_classes_within_an_epoch():
    order = DataOrder(100, seed=5, labels=LABELS, class_balance=1.0)
    first_half = LABELS[order.indices(0, 50)].bincount(minlength=5)
    assert (first_half[[0, 1, 3, 4]] > 3).all()


def test_balanced_order_is_a_function_of_position():
    settings = {"labels": LABELS, "class_balance": 0.7}
    whole = DataOrder(100, seed=0, **settings).indices(0, 350)
    order = DataOrder(100, seed=0, **settings)
    assert torch.equal(torch.cat([order.indices(start, 35) for start in range(0, 350, 35)]), whole)
    assert torch.equal(DataOrder(100, seed=0, **settings).indices(123, 60), whole[123:183])
    assert not torch.equal(DataOrder(100, seed=1, **settings).indices(0, 350), whole)


def test_no_balance_is_the_plain_order():
    assert torch.equal(DataOrder(100, seed=2, labels=LABELS).indices(0, 250), DataOrder(100, seed=2).indices(0, 250))


def test_balance_needs_classes():
    for labels in (None, torch.full((100,), -1)):
        with pytest.raises(ValueError, match="not every image has a class"):
            DataOrder(100, seed=0, labels=labels, class_balance=0.5)
    with pytest.raises(ValueError, match=r"class_balance is 1\.5"):
        DataOrder(100, seed=0, labels=LABELS, class_balance=1.5)
