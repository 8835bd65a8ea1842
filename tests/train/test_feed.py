import threading
import time
from dataclasses import replace
from itertools import chain

import pytest
import torch

from maskdm_fast.data import DataOrder
from maskdm_fast.train import feed as feeds
from maskdm_fast.train.feed import DEVICE_SHARE, Feed, keeps_on_device
from maskdm_fast.train.world import World

CPU = torch.device("cpu")


class Numbers:
    """Image i is full of i, and of class i % 3. Notes which thread read what."""

    def __init__(self, count: int = 20) -> None:
        self.labels = torch.arange(count) % 3
        self.images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 1).contiguous()
        self.nbytes, self.is_mapped = self.images.nbytes, True
        self.read: list[tuple[str, list[int]]] = []
        self.failing = False

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices):
        if self.failing:
            raise OSError("the disk is gone")
        self.read.append((threading.current_thread().name, indices.tolist()))
        return self.images[indices], self.labels[indices]


def make_feed(config, *, store=None, world=None, ahead=False):
    return Feed(config, store or Numbers(), world or World(CPU), ahead=ahead)


def values(batches):
    return [(batch.images[:, 0, 0, 0].tolist(), batch.labels.tolist(), batch.slots.tolist()) for batch in batches]


def wanted(config, step, count=20):
    size = config.stage.batch_size
    return DataOrder(count, config.seed).indices(step * size, size).tolist()


@pytest.fixture(params=[False, True], ids=["at_once", "ahead"])
def ahead(request):
    return request.param


def test_steps_follow_the_order_of_the_data(make_config, ahead):
    """Also over the end of an epoch, which comes after 5 of these steps, and when steps are left out or repeated."""
    config = make_config(micro_batch_size=3)
    feed = make_feed(config, ahead=ahead)
    for step in (0, 1, 2, 7, 8, 3, 3, 4, 5):
        batches = feed.batches(step)
        assert [len(batch.slots) for batch in batches] == [2, 2]
        images, labels, slots = (list(chain(*part)) for part in zip(*values(batches), strict=True))
        assert images == wanted(config, step)
        assert labels == [image % 3 for image in images]
        assert slots == [0, 1, 2, 3]
    feed.close()


@pytest.mark.parametrize("is_mapped", [True, False])
def test_images_that_must_be_decoded_are_read_ahead(make_config, is_mapped):
    store = Numbers()
    store.is_mapped = is_mapped
    feed = make_feed(make_config(), store=store, ahead=None)
    feed.batches(0)
    feed.close()
    assert {name.startswith("feed") for name, _ in store.read} == {not is_mapped}


def test_processes_share_the_batch(make_config, ahead):
    config = make_config()
    parts = [make_feed(config, world=World(CPU, rank, 2), ahead=ahead).batches(3) for rank in (0, 1)]
    assert [image for part in parts for image in values(part)[0][0]] == wanted(config, 3)
    assert [values(part)[0][2] for part in parts] == [[0, 1], [2, 3]]


def test_a_share_is_the_same_whatever_the_seed(make_config):
    seen = []
    for seed in (0, 1):
        config = make_config(data_share=0.3, seed=seed)
        feed = make_feed(config)
        seen.append({image for step in range(3) for image in values(feed.batches(step))[0][0]})
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_the_next_step_is_prepared_by_the_time_it_is_asked_for(make_config):
    config, store = make_config(), Numbers()
    feed = make_feed(config, store=store, ahead=True)
    feed.batches(4)
    deadline = time.monotonic() + 10
    while len(store.read) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [read for _, read in store.read] == [wanted(config, 4), wanted(config, 5)]
    feed.batches(5)
    feed.close()
    assert all(name.startswith("feed") for name, _ in store.read)
    assert [read for _, read in store.read][:3] == [wanted(config, step) for step in (4, 5, 6)][: len(store.read)]


def test_nothing_is_read_ahead_on_the_cpu_by_itself(make_config):
    store = Numbers()
    feed = Feed(make_config(), store, World(CPU))
    feed.batches(0)
    assert [name for name, _ in store.read] == [threading.current_thread().name]
    assert not feed.images_on_device


def test_errors_keep_their_type(make_config, ahead):
    """One that is met while reading ahead shows when that step is asked for, and no sooner; a later try may succeed."""
    config, store = make_config(), Numbers()
    feed = make_feed(config, store=store, ahead=ahead)
    feed.batches(0)
    while ahead and len(store.read) < 2:
        time.sleep(0.001)
    store.failing = True
    if ahead:
        feed.batches(1)  # was read before
    with pytest.raises(OSError, match="the disk is gone"):
        feed.batches(2)
    store.failing = False
    assert values(feed.batches(2))[0][0] == wanted(config, 2)
    feed.close()


def test_an_error_of_a_wrong_guess_does_not_matter(make_config):
    config, store = make_config(), Numbers()
    good, feed = store.batch, make_feed(config, store=store, ahead=True)

    def batch(indices):
        if indices.tolist() == wanted(config, 1):
            raise OSError("a bad sector")
        return good(indices)

    store.batch = batch
    feed.batches(0)
    assert values(feed.batches(2))[0][0] == wanted(config, 2)
    feed.close()


def test_a_closed_feed_leaves_no_thread(make_config):
    before = set(threading.enumerate())  # feeds of other tests may end theirs meanwhile
    feed = make_feed(make_config(), ahead=True)
    feed.batches(0)
    (mine,) = set(threading.enumerate()) - before
    feed.close()
    feed.close()
    assert not mine.is_alive()


def test_class_balance_needs_classes(make_config):
    config = make_config()
    config = replace(config, stage=replace(config.stage, class_balance=1.0))
    store = Numbers()
    store.labels = torch.full((20,), -1)
    with pytest.raises(ValueError, match="not every image has a class"):
        make_feed(config, store=store)


def test_where_images_are_kept():
    def kept(wanted, num_bytes, free_bytes=1000, still_needed=0):
        return keeps_on_device(wanted, num_bytes=num_bytes, free_bytes=free_bytes, still_needed=still_needed)

    most = int(DEVICE_SHARE * 1000)
    assert kept("auto", most) and not kept("auto", most + 1)
    assert not kept("auto", most, still_needed=10)
    assert not kept("auto", 0, still_needed=2000)
    assert kept("device", 1000) and kept("device", 600, still_needed=400)
    assert not kept("cpu", 1)
    assert not kept("auto", 1, free_bytes=None) and not kept("cpu", 1, free_bytes=None)
    with pytest.raises(RuntimeError, match="--data-device auto or cpu"):
        kept("device", 601, still_needed=400)
    with pytest.raises(ValueError, match="want auto or cpu"):
        kept("device", 1, free_bytes=None)


def test_images_on_a_device_are_asked_for_by_name(make_config):
    with pytest.raises(ValueError, match="the run is on the CPU"):
        make_feed(make_config(data_device="device"))


class Inline:
    """Stands for `SideStream` on the CPU, which has no streams: the work is done at once."""

    def __init__(self, device) -> None:
        pass

    def queue(self, work):
        tensors = work()
        return lambda: tensors

    def mark(self):
        return lambda: None


@pytest.mark.parametrize("kept", [False, True], ids=["travel", "kept"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_a_gpu_is_given(make_config, monkeypatch, kept, share):
    """The GPU's way of reading, on the CPU: what differs is the stream, the pinning and the free memory."""
    config = make_config(micro_batch_size=2, data_share=share)
    monkeypatch.setattr(feeds, "_CHUNK_BYTES", 3 * 4)  # three images at a time
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    plain = make_feed(config)
    feed = make_feed(config, ahead=True)
    feed._side = Inline(CPU)
    if kept:
        feed._there = tuple(feed._copy_all(CPU))
        assert len(feed._there[0]) == round(20 * share)
    for step in range(8):
        assert values(feed.batches(step)) == values(plain.batches(step))
    feed.close()


def test_the_host_is_two_steps_ahead_at_most(make_config, monkeypatch):
    """Step 3 is not read before the device has done what was launched before step 1 was asked for: step 0."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    config, store, calls = make_config(), Numbers(), 0
    done = [threading.Event() for _ in range(4)]  # of what was launched before call i

    class Device(Inline):
        def mark(self):
            return done[calls - 1].wait

    feed = make_feed(config, store=store, ahead=True)
    feed._side = Device(CPU)
    try:
        for calls in (1, 2, 3):
            feed.batches(calls - 1)
            done[0].set()
        time.sleep(0.05)
        assert len(store.read) == 3
        done[1].set()
        feed.batches(3)
        assert [read for _, read in store.read[:4]] == [wanted(config, step) for step in range(4)]
    finally:
        for event in done:
            event.set()
        feed.close()
