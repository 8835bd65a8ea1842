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
