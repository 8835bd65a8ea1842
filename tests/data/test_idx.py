import gzip
import struct

import numpy as np
import pytest
import torch

from maskdm_fast.data import ImageStore, StoreError, find_source, idx_source, open_dataset, pack
from maskdm_fast.data.idx import is_idx


def _idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _write(path, array):
    data = _idx(np.asarray(array, np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)


def _set(folder, images, labels, name="train-", end=".gz"):
    _write(folder / f"{name}images-idx3-ubyte{end}", images)
    _write(folder / f"{name}labels-idx1-ubyte{end}", labels)


def _open(path, tmp_path, size=32, **options):
    return open_dataset(path, size, cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("end", [".gz", ""])
def test_28_pixels_become_32_by_a_black_border(tmp_path, images, end):
    _set(tmp_path / "set", images, [3, 1, 4, 1, 5, 9], end=end)
    store = _open(tmp_path / "set", tmp_path)
    store.verify()
    assert store.images.shape == (6, 32, 32, 1)
    assert np.array_equal(store.images[:, 2:30, 2:30, 0], images)
    assert store.images[:, :2].max() == store.images[:, 30:].max() == 0
    assert store.images[:, :, :2].max() == store.images[:, :, 30:].max() == 0
    assert store.class_names == ["1", "3", "4", "5", "9"] and store.labels.tolist() == [1, 0, 2, 0, 3, 4]
    assert store.path.name.startswith("set-train-32px-")


def test_other_sizes_are_kept_or_resized(tmp_path, images):
    images[1] = 77
    _set(tmp_path / "set", images, [0] * 6)
    assert np.array_equal(_open(tmp_path / "set", tmp_path, 28).images[..., 0], images)
    small = _open(tmp_path / "set", tmp_path, 16).images
    assert small.shape == (6, 16, 16, 1) and np.all(small[1] == 77)
    assert abs(float(small[0].mean()) - images[0].mean()) < 3


def test_three_channels_repeat_the_grey_value(tmp_path, images):
    _set(tmp_path / "set", images, [0] * 6)
    grey, colour = (_open(tmp_path / "set", tmp_path, channels=channels) for channels in (None, 3))
    assert grey.path != colour.path and colour.channels == 3
    assert np.array_equal(colour.images, np.repeat(grey.images, 3, axis=3))
    with pytest.raises(ValueError, match="channels is 2"):
        _open(tmp_path / "set", tmp_path, channels=2)


def test_names_of_classes_sort_like_their_values(tmp_path, images):
    _set(tmp_path / "set", images, [2, 10, 1, 47, 2, 10])
    source = idx_source(tmp_path / "set")
    assert source.class_names == ("01", "02", "10", "47") and source.labels == (1, 2, 0, 3, 1, 2)


def test_which_file_a_folder_stands_for(tmp_path, images):
    folder = tmp_path / "set"
    _set(folder, images[:4], [0] * 4)
    _set(folder, images, [0] * 6, name="t10k-")
    assert len(find_source(folder).labels) == 4
    assert len(find_source(folder / "t10k-images-idx3-ubyte.gz").labels) == 6
    _write(folder / "train-images-idx3-ubyte", images[:4])  # the unpacked one beside the packed one
    assert find_source(folder).path.name == "train-images-idx3-ubyte"
    for name in ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"):
        (folder / name).unlink()
    _write(folder / "other-images.idx3-ubyte", images)
    with pytest.raises(ValueError, match=r"several sets \(other-images.idx3-ubyte, t10k-images-idx3-ubyte.gz\)"):
        find_source(folder)


def test_without_labels_there_are_no_classes(tmp_path, images):
    _write(tmp_path / "images.idx3-ubyte", images)
    store = pack(find_source(tmp_path / "images.idx3-ubyte"), tmp_path / "a.store", 28)
    assert store.labels.tolist() == [-1] * 6 and store.class_names == []


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_links_to_nothing_are_told(tmp_path, images, kind):
    """They used to be passed over: another set was taken, or the images had no classes."""
    _set(tmp_path, images, [0] * 6)
    _set(tmp_path, images, [0] * 6, name="t10k-")
    path = tmp_path / f"train-{kind}-ubyte.gz"
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=path.name):
        find_source(tmp_path)


def test_fingerprint_sees_images_and_labels(tmp_path, images):
    _set(tmp_path / "set", images, [0] * 6)
    seen = {idx_source(tmp_path / "set").fingerprint, idx_source(tmp_path / "set").fingerprint}
    assert len(seen) == 1
    for content in (images, images[::-1].copy()):
        _set(tmp_path / "set", content, [0, 1] * 3)
        seen.add(idx_source(tmp_path / "set").fingerprint)
    assert len(seen) == 3


def test_progress_counts_images(tmp_path, images):
    _set(tmp_path / "set", images, [0] * 6)
    calls = []
    _open(tmp_path / "set", tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(6, 6)]


def test_errors_say_what_is_wrong(tmp_path, images):
    path = tmp_path / "train-images-idx3-ubyte"
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        idx_source(path)
    with pytest.raises(ValueError, match="no file of images"):
        idx_source(tmp_path)
    assert not is_idx(path) and not is_idx(tmp_path)
    _write(path, images)
    _write(tmp_path / "train-labels-idx1-ubyte", [0] * 5)
    with pytest.raises(ValueError, match=r"holds 6 images, but .* 5 labels"):
        idx_source(path)
    with pytest.raises(ValueError, match="is not named like"):
        idx_source(tmp_path / "train-labels-idx1-ubyte")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "shorter than its header"),
        (whole + b"x", "longer than its header"),
        (gzip.compress(whole)[:-9], "is damaged|shorter"),
        (gzip.compress(whole)[:-4] + b"abcd", "is damaged"),
        (b"\0\0\x0d\3" + whole[4:], "no idx file of unsigned bytes in 3"),
        (b"\0\0", "shorter than its header"),
        (struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28), "is empty: its header says 0x28x28"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            _open(path, tmp_path)
    assert not list((tmp_path / "cache").glob("*"))


def test_packed_stores_are_opened_as_they_are(tmp_path, images):
    _set(tmp_path / "set", images, [0] * 6)
    store = pack(find_source(tmp_path / "set"), tmp_path / "mine.store", 32)
    again = _open(tmp_path / "mine.store", tmp_path, channels=1)
    assert again.path == store.path and torch.equal(again.labels, store.labels)
    assert isinstance(again, ImageStore) and not (tmp_path / "cache").exists()
    for options in ({"size": 28}, {"channels": 3}):
        with pytest.raises(ValueError, match=r"holds images of 32x32x1 .* pack it again"):
            _open(tmp_path / "mine.store", tmp_path, **options)
    with pytest.raises(FileNotFoundError):
        _open(tmp_path / "missing.store", tmp_path)
    (tmp_path / "other.store").write_bytes(b"text")
    with pytest.raises(StoreError, match="is not an image store"):
        _open(tmp_path / "other.store", tmp_path)
