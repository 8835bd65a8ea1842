"""Stores of several files under one index."""

import logging
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast.data import ImageStore, StoreError, UnreadableImagesError, find_source, open_dataset, pack
from maskdm_fast.data import packing as packing_module
from maskdm_fast.eval import FeatureNetwork, compute_features

SIZE, IMAGE_BYTES = 8, 8 * 8 * 3


@pytest.fixture
def folder(tmp_path):
    """13 images of three classes."""
    folder = tmp_path / "images"
    pixels = np.random.default_rng(0).integers(0, 256, (13, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "abc"[number // 5] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def _pack(folder, path, per_file, **options):
    return pack(find_source(folder), path, SIZE, shard_bytes=per_file * IMAGE_BYTES, **options)


def _parts(tmp_path):
    return sorted(path.name for path in (tmp_path / "many.shards").iterdir() if path.suffix == ".store")


@pytest.mark.parametrize("per_file", [1, 4, 12])
def test_many_files_are_used_like_one(folder, tmp_path, per_file):
    calls = []
    one = _pack(folder, tmp_path / "one.store", 13)
    many = _pack(folder, tmp_path / "many.store", per_file, progress=lambda *call: calls.append(call))
    assert (one.num_files, many.num_files, len(_parts(tmp_path))) == (1, *[-(-13 // per_file)] * 2)
    assert calls[-1] == (13, 13)
    assert many.header == one.header  # the checksum too: a run goes on with either
    assert (many.nbytes, many.is_mapped, many.images.dtype) == (13 * IMAGE_BYTES, True, np.uint8)
    assert (many.image_size, many.channels, many.class_names) == (8, 3, ["a", "b", "c"])
    indices = torch.tensor([12, 0, 4, 3, 4, 7])
    for a, b in zip(one.batch(indices), many.batch(indices), strict=True):
        assert torch.equal(a, b)
    for key in (slice(None), slice(3, 11, 2), 5, -1, np.array([1, 12, 0]), [], np.arange(13) % 2 == 0):
        assert np.array_equal(many.images[key], one.images[key])
    assert many.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 3
    many.verify()
    assert torch.equal(*(compute_features(store.images, _Mean(), batch_size=3) for store in (one, many)))
    assert many.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 8, 8, 3)
    with pytest.raises(IndexError, match=r"want 0\.\.12"):
        many.batch(torch.tensor([13]))


class _Mean(FeatureNetwork):
    name, kernel_name, num_features, fingerprint = "FD-mean", "KID-mean", 3, "mean"

    def forward(self, images):
        return images.float().mean(dim=(2, 3))


def test_reading_ahead_changes_nothing_and_names_the_right_bytes(folder, tmp_path, monkeypatch):
    asked = []

    class Mapping:
        def madvise(self, advice, start, length):
            asked.append((start, length))

    for per_file in (4, 13):
        store = _pack(folder, tmp_path / "many.store", per_file)
        indices = torch.tensor([12, 0, 4, 3, 4])
        want = store.batch(indices)[0]
        monkeypatch.setattr("maskdm_fast.data.store.READ_AHEAD_BYTES", 0)
        assert torch.equal(store.batch(indices)[0], want)
        for file in store._files:
            file._mapping = Mapping()
        asked.clear()
        store.batch(indices)
        starts = sorted(4096 + index % per_file * IMAGE_BYTES for index in indices.tolist())
        assert sorted(start + length - IMAGE_BYTES for start, length in asked) == starts
        assert all(start % mmap.PAGESIZE == 0 for start, _ in asked)


def test_both_can_be_moved_together(folder, tmp_path):
    want = _pack(folder, tmp_path / "many.store", 4).header
    other = tmp_path / "other"
    other.mkdir()
    shutil.move(tmp_path / "many.store", other)
    with pytest.raises(StoreError, match=r"is missing, which .* names: move both together"):
        ImageStore.open(other / "many.store")
    shutil.move(tmp_path / "many.shards", other)
    assert open_dataset(other / "many.store", SIZE, cache_dir=tmp_path / "cache").header == want


def _damage(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_damage(folder, tmp_path):
    store = _pack(folder, tmp_path / "many.store", 4)
    part = tmp_path / "many.shards" / _parts(tmp_path)[1]
    _damage(part, 4096 + 5)
    with pytest.raises(StoreError, match=rf"the data of '.*{part.name}' is damaged"):
        store.verify()
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(StoreError, match=part.name):
        ImageStore.open(tmp_path / "many.store")
    shutil.copy(tmp_path / "many.shards" / _parts(tmp_path)[0], part)
    with pytest.raises(StoreError, match="is another file than"):
        ImageStore.open(tmp_path / "many.store")
    index = (tmp_path / "many.store").read_bytes()
    for damaged in (index[:-1], index[:30], index[:80] + b"?" + index[81:]):
        (tmp_path / "many.store").write_bytes(damaged)
        with pytest.raises(StoreError):
            ImageStore.open(tmp_path / "many.store")


def test_goes_on_after_the_last_whole_file(folder, tmp_path, monkeypatch, caplog):
    want = _pack(folder, tmp_path / "one.store", 13).header
    written, real = [], packing_module.write_store

    def crash(path, *arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *arguments, **options)

    monkeypatch.setattr(packing_module, "write_store", crash)
    with pytest.raises(KeyboardInterrupt):
        _pack(folder, tmp_path / "many.store", 4)
    assert _parts(tmp_path) == written and not (tmp_path / "many.store").exists()
    _damage(tmp_path / "many.shards" / written[1], 4096)

    def count(path, *arguments, **options):
        written.append(path.name)
        real(path, *arguments, **options)

    monkeypatch.setattr(packing_module, "write_store", count)
    calls = []
    with caplog.at_level(logging.WARNING):
        store = _pack(folder, tmp_path / "many.store", 4, progress=lambda *call: calls.append(call))
    assert store.header == want and "packing a part again" in caplog.text
    assert written[2:] == _parts(tmp_path)[1:] and calls[-1] == (13, 13)


def test_another_packing_to_the_same_name_replaces_it(folder, tmp_path):
    first = _pack(folder, tmp_path / "many.store", 4)
    folder_of_parts = tmp_path / "many.shards"
    (folder_of_parts / f".{_parts(tmp_path)[0]}.12-0123abcd.tmp").write_bytes(b"left by a killed writer")
    not_ours = ["a.store", f"b{_parts(tmp_path)[0]}", ".x.store.1-0123abcd.tmp", f".{_parts(tmp_path)[0]}.part.tmp"]
    for name in not_ours:
        (folder_of_parts / name).write_bytes(b"of someone else")
    (folder / "a" / "00.png").unlink()
    second = _pack(folder, tmp_path / "many.store", 6)
    assert first.header.checksum != second.header.checksum and len(first.images[:]) == 13  # still open
    assert len(_parts(tmp_path)) == 2 + 2 and len(list(folder_of_parts.glob(".*.tmp"))) == 2
    assert ImageStore.open(tmp_path / "many.store").header == second.header
    _pack(folder, tmp_path / "many.store", 13)
    assert ImageStore.open(tmp_path / "many.store").num_files == 1
    assert sorted(path.name for path in folder_of_parts.iterdir()) == sorted([*not_ours, ".lock"])


def test_unreadable_images(folder, tmp_path, caplog):
    files = sorted(folder.rglob("*.png"))
    for number in (0, 4, 5, 6, 7):  # of 0..3, 4..7, 8..11, 12
        files[number].write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError, match=r"5 of 13 images") as caught:
        _pack(folder, tmp_path / "many.store", 4)
    assert [name for name, _ in caught.value.files] == [
        files[number].relative_to(folder).as_posix() for number in (0, 4, 5, 6, 7)
    ]
    assert not (tmp_path / "many.store").exists() and len(_parts(tmp_path)) == 2
    with caplog.at_level(logging.WARNING):
        many = _pack(folder, tmp_path / "many.store", 4, skip_bad=True)
    assert many.header == _pack(folder, tmp_path / "one.store", 13, skip_bad=True).header
    assert (len(many), many.num_files, len(many.header.skipped)) == (8, 3, 5) and "b/07.png" in caplog.text
    again = _pack(folder, tmp_path / "many.store", 4, skip_bad=True)
    assert again.header == many.header
    for file in files:
        file.write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError, match="13 of 13"):
        _pack(folder, tmp_path / "none.store", 4, skip_bad=True)


def test_the_cache_holds_many_files_too(folder, tmp_path):
    def open_it():
        return open_dataset(folder, SIZE, cache_dir=tmp_path / "cache", shard_bytes=4 * IMAGE_BYTES)

    store = open_it()
    assert store.num_files == 4 and open_it().path == store.path
    next((tmp_path / "cache").glob("*.shards/*.store")).unlink()
    assert open_it().header == store.header
    open_it().verify()


def _pack_slowly(folder, path):
    real = packing_module.decode_range

    def slow(*arguments):
        for image in real(*arguments):
            time.sleep(0.02)
            yield image

    packing_module.decode_range = slow
    _pack(folder, path, 2)


def test_processes_at_the_same_time_and_a_killed_one(folder, tmp_path):
    want = _pack(folder, tmp_path / "one.store", 13).header
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_pack_slowly, args=(folder, tmp_path / "many.store")) for _ in range(4)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("many.shards/*.store")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0, 0]
    store = ImageStore.open(tmp_path / "many.store")
    store.verify()
    assert store.header == want and store.num_files == len(_parts(tmp_path)) == 7


def test_too_little_space_is_told_before_the_work(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for per_file in (4, 13):
        with pytest.raises(OSError, match=re.escape("has 0.0 GiB of free space, but the images take")):
            _pack(folder, tmp_path / "many.store", per_file)
    assert not list(tmp_path.rglob("*.store"))
