import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast.data import UnreadableImagesError, folder_source, open_dataset, pack


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my images"
    for index in range(12):
        path = folder / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    return folder


def _break(folder, number):
    files = sorted(folder.rglob("*.png"))[:number]
    for index, file in enumerate(files):
        content = file.read_bytes()
        file.write_bytes((b"", b"not an image", content[: len(content) // 2])[index % 3])
    return [file.relative_to(folder).as_posix() for file in files]


def test_packs_once_and_again_when_the_folder_changes(folder, tmp_path):
    cache, calls = tmp_path / "cache", []

    def open_it(size=8):
        return open_dataset(folder, size, cache_dir=cache, progress=lambda done, total: calls.append((done, total)))

    store = open_it()
    store.verify()
    assert calls == [(12, 12)]
    assert store.images[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert store.labels.tolist() == [0] * 6 + [1] * 6 and store.class_names == ["class0", "class1"]
    assert open_it().path == store.path and len(calls) == 1
    assert store.path.name.startswith("my_images-8px-")
    assert open_it(4).image_size == 4 and len(calls) == 2
    os.utime(folder / "class0" / "00.png", (1, 1))
    assert open_it().path != store.path and len(calls) == 3


def test_broken_cache_file_is_packed_again(folder, tmp_path, caplog):
    store = open_dataset(folder, 8, cache_dir=tmp_path / "cache")
    store.path.write_bytes(store.path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        again = open_dataset(folder, 8, cache_dir=tmp_path / "cache")
    again.verify()
    assert again.path == store.path and "again" in caplog.text


def test_unreadable_files_are_named(folder, tmp_path):
    names = _break(folder, 3)
    with pytest.raises(UnreadableImagesError, match=r"3 of 12 images of 'my images' cannot be read") as caught:
        open_dataset(folder, 8, cache_dir=tmp_path / "cache")
    assert [name for name, _ in caught.value.files] == names
    assert all(name in str(caught.value) for name in names) and "--skip-bad" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_long_lists_are_cut(folder, tmp_path):
    _break(folder, 11)
    with pytest.raises(UnreadableImagesError, match=r"\.\.\. and 1 more"):
        open_dataset(folder, 8, cache_dir=tmp_path / "cache")


def test_skip_bad_lists_them_and_is_asked_for_each_time(folder, tmp_path, caplog):
    names = _break(folder, 3)
    with caplog.at_level(logging.WARNING):
        store = open_dataset(folder, 8, cache_dir=tmp_path / "cache", skip_bad=True)
    store.verify()
    assert len(store) == 9 and [name for name, _ in store.header.skipped] == names
    assert all(name in caplog.text for name in names)
    assert len(open_dataset(folder, 8, cache_dir=tmp_path / "cache", skip_bad=True)) == 9
    with pytest.raises(UnreadableImagesError, match="3 of 12"):
        open_dataset(folder, 8, cache_dir=tmp_path / "cache")


def test_nothing_readable(folder, tmp_path):
    _break(folder, 12)
    with pytest.raises(UnreadableImagesError, match="12 of 12"):
        open_dataset(folder, 8, cache_dir=tmp_path / "cache", skip_bad=True)


def test_flat_folder_and_size_check(folder, tmp_path):
    source = folder_source(folder / "class1")
    assert pack(source, tmp_path / "new" / "flat.store", 4).labels.tolist() == [-1] * 6
    with pytest.raises(ValueError, match="image_size is 0"):
        pack(source, tmp_path / "flat.store", 0)


def test_emoji(tmp_path):
    store = open_dataset("emoji", 16, cache_dir=tmp_path)
    assert store.images.shape == (1949, 16, 16, 3) and "CC-BY 4.0" in store.header.attribution
    images, labels = store.batch(torch.arange(1949))
    assert labels.min() == 0 and labels.max() == 9
    # On white: nearly every picture has white corners, and none is blank.
    corners = images[:, 0, 0].min(dim=1).values
    assert (corners > 250).float().mean() > 0.8
    assert np.all(images.flatten(1).min(dim=1).values.numpy() < 250)
