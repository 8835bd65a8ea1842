import multiprocessing
import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from maskdm_fast.data import ImageStore, StoreError, write_store


def _pairs(num_images, size=4, delay=0.0):
    for index in range(num_images):
        time.sleep(delay)
        yield np.full((size, size, 3), index % 251, np.uint8), index % 3


@pytest.fixture
def path(tmp_path):
    write_store(tmp_path / "a.store", _pairs(5), image_size=4, class_names=("x", "y", "z"), source="s", fingerprint="f")
    return tmp_path / "a.store"


def _rewrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_round_trip(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = ImageStore.open(path)
        images, labels = store.batch(torch.tensor([4, 0, 4]))
        images += 1  # a copy: torch must neither warn nor write through
    assert (len(store), store.image_size, store.channels, store.class_names) == (5, 4, 3, ["x", "y", "z"])
    assert images.dtype == torch.uint8 and images.shape == (3, 4, 4, 3)
    assert images[:, 0, 0, 0].tolist() == [5, 1, 5]
    assert labels.dtype == torch.int64 and labels.tolist() == [1, 0, 1]
    assert store.labels.tolist() == [0, 1, 2, 0, 1]
    assert store.images[4].max() == 4 and not store.images.flags.writeable
    assert (store.header.source, store.header.fingerprint) == ("s", "f")
    assert store.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 4, 4, 3)
    store.verify()


@pytest.mark.parametrize("indices", [[5], [-1], [0, 7]])
def test_batch_rejects_indices_out_of_range(path, indices):
    with pytest.raises(IndexError, match=r"want 0\.\.4"):
        ImageStore.open(path).batch(torch.tensor(indices))


def test_foreign_and_short_files(tmp_path):
    for name, content in (("empty", b""), ("short", b"maskdm"), ("foreign", b"\x89PNG" + bytes(9000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match="is not an image store"):
            ImageStore.open(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ImageStore.open(tmp_path / "missing")


def test_truncated_anywhere(path):
    content = path.read_bytes()
    for size in (70, 4096, 4200, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(StoreError, match="delete it and pack again"):
            ImageStore.open(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(StoreError, match="delete it and pack again"):
        ImageStore.open(path)


def test_other_version(path):
    _rewrite(path, 8, (99).to_bytes(4, "little"))
    with pytest.raises(StoreError, match="version 99, want 1 or 2"):
        ImageStore.open(path)


def test_damage(path):
    _rewrite(path, 4096 + 17, b"\xee")
    store = ImageStore.open(path)
    with pytest.raises(StoreError, match=r"data of .* is damaged"):
        store.verify()
    _rewrite(path, path.stat().st_size - 2, b"x")
    with pytest.raises(StoreError, match=r"header of .* is damaged"):
        ImageStore.open(path)


def test_wrong_image_and_no_images_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"image 0 is uint8 \(4, 4, 3\), want uint8 \(8, 8, 3\)"):
        write_store(tmp_path / "a.store", _pairs(2), image_size=8)
    with pytest.raises(ValueError, match="no images"):
        write_store(tmp_path / "a.store", [], image_size=8)
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_that_opens(tmp_path):
    writer = multiprocessing.get_context("fork").Process(
        target=write_store, args=(tmp_path / "a.store", _pairs(10_000, delay=0.01)), kwargs={"image_size": 4}
    )
    writer.start()
    deadline = time.monotonic() + 20
    while not (leftovers := list(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert [path.suffix for path in leftovers] == [".tmp"]
    assert not (tmp_path / "a.store").exists()
    with pytest.raises(StoreError):
        ImageStore.open(leftovers[0])
    # The next writer removes what a dead one left, once it is surely dead.
    write_store(tmp_path / "a.store", _pairs(2), image_size=4)
    assert leftovers[0].exists()
    os.utime(leftovers[0], (0, 0))
    write_store(tmp_path / "a.store", _pairs(2), image_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.store"]


def test_writers_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(
            target=write_store, args=(tmp_path / "a.store", _pairs(60, delay=0.002)), kwargs={"image_size": 4}
        )
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = ImageStore.open(tmp_path / "a.store")
    store.verify()
    assert store.images[:, 0, 0, 0].tolist() == list(range(60))
    assert [path.name for path in tmp_path.iterdir()] == ["a.store"]
