import torch

from maskdm_fast.data import DataOrder, LatentScaling, no_images


def test_zeros_and_no_classes():
    store = no_images((8, 8, 3))
    images, labels = store.batch(torch.tensor([5, 0, len(store) - 1]))
    assert images.shape == (3, 8, 8, 3) and images.dtype == torch.uint8 and not images.any()
    assert (labels == -1).all() and store.class_names == []
    assert store.images[3:5].shape == (2, 8, 8, 3)


def test_classes_are_equally_frequent():
    store = no_images((4, 4, 1), ("a", "b", "c"))
    order = DataOrder(len(store), seed=0, labels=store.labels, class_balance=0.0)
    seen = store.labels[order.indices(0, len(store))]
    assert torch.bincount(seen).tolist() == [len(store) // 3] * 3


def test_latents_keep_their_scale():
    store = no_images((4, 4, 4), latents=LatentScaling(0.18215, 0.0), bound=5.0)
    images, _ = store.batch(torch.tensor([0]))
    assert images.dtype == torch.float16 and store.latents.scale == 0.18215 and store.header.bound == 5.0
