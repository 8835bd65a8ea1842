import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskdm_fast.data import ImageStore, LatentScaling, StoreError, find_source, latent_source, open_dataset, pack

SCALING = LatentScaling(0.18215, 0.5)


def _latents(count, channels=4, side=6, seed=0):
    return np.random.default_rng(seed).normal(0.5, 5.0, (count, channels, side, side)).astype(np.float16)


def _x0(z, scaling=SCALING):
    x0 = (z.astype(np.float32) - np.float32(scaling.shift)) * np.float32(scaling.scale)
    return x0.astype(np.float16).transpose(0, 2, 3, 1)


def _open(name, tmp_path, *, size=6, scaling=SCALING, **options):
    return open_dataset(name, size, cache_dir=tmp_path / "cache", latents=scaling, **options)


def _save(path, z, labels=None):
    """As the suffix says; labels where they belong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, z)
        if labels is not None:
            np.save(path.with_name(f"{path.stem}-labels.npy"), labels)
    else:
        held = {"latents": z} | ({} if labels is None else {"labels": labels})
        if path.suffix == ".npz":
            np.savez(path, **held)
        else:
            save_file({name: torch.as_tensor(value) for name, value in held.items()}, path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_one_file(tmp_path, suffix):
    z, labels = _latents(7), np.array([9, 3, 9, 100, 3, 9, 9])
    _save(tmp_path / f"z{suffix}", z, labels)
    store = _open(tmp_path / f"z{suffix}", tmp_path)
    store.verify()
    assert (store.latents, store.channels, store.image_size, len(store)) == (SCALING, 4, 6, 7)
    assert store.class_names == ["003", "009", "100"] and store.labels.tolist() == [1, 0, 1, 2, 0, 1, 1]
    assert np.array_equal(store.images, _x0(z)) and store.images.dtype == np.float16
    images, labels = store.batch(torch.tensor([6, 0]))
    assert images.dtype == torch.float16 and labels.tolist() == [1, 1]
    assert np.array_equal(images.numpy(), _x0(z)[[6, 0]])
    assert store.nbytes == 7 * 6 * 6 * 4 * 2
    _save(tmp_path / f"unlabelled{suffix}", z)
    assert _open(tmp_path / f"unlabelled{suffix}", tmp_path).class_names == []


def test_dtypes_and_single_latents(tmp_path):
    z = _latents(3)
    _save(tmp_path / "a.npy", z.astype(np.float32))
    _save(tmp_path / "b.safetensors", torch.from_numpy(z.astype(np.float32)).bfloat16())
    _save(tmp_path / "c.npy", z[0])
    assert np.array_equal(_open(tmp_path / "a.npy", tmp_path).images, _x0(z))
    rounded = torch.from_numpy(z.astype(np.float32)).bfloat16().float().numpy()
    assert np.array_equal(_open(tmp_path / "b.safetensors", tmp_path).images, _x0(rounded))
    assert np.array_equal(_open(tmp_path / "c.npy", tmp_path).images, _x0(z[:1]))


def test_a_folder_and_parts_of_it(tmp_path):
    """Files of different kinds and lengths end to end, by name; also where the files of a store cut through them."""
    z = _latents(11)
    folder = tmp_path / "z"
    _save(folder / "dog" / "0.npy", z[:2])
    _save(folder / "dog" / "1.safetensors", z[2:7])
    _save(folder / "emu" / "deeper" / "0.npz", z[7:10])
    _save(folder / "emu" / "x.npy", z[10])
    one = _open(folder, tmp_path)
    assert np.array_equal(one.images, _x0(z)) and one.class_names == ["dog", "emu"]
    assert one.labels.tolist() == [0] * 7 + [1] * 4
    many = pack(latent_source(folder, SCALING), tmp_path / "many.store", 6, shard_bytes=3 * 6 * 6 * 4 * 2)
    assert one.header.bound == np.abs(one.images).max() > 1
    assert many.num_files == 4 and many.header == one.header and many.latents == SCALING
    assert np.array_equal(np.asarray(many.images), one.images) and many.images.dtype == np.float16
    many.verify()


def test_labels_in_the_files_count_before_folders(tmp_path):
    folder = tmp_path / "z"
    _save(folder / "b" / "0.npy", _latents(2), np.array([7, 5]))
    _save(folder / "c" / "0.npz", _latents(1), np.array([5]))
    store = _open(folder, tmp_path)
    assert store.class_names == ["5", "7"] and store.labels.tolist() == [1, 0, 0]


def test_scaling_is_kept_undone_and_part_of_the_key(tmp_path):
    z = _latents(5)
    _save(tmp_path / "z.npy", z)
    stores = [_open(tmp_path / "z.npy", tmp_path, scaling=LatentScaling(*s)) for s in ((0.2, 0.0), (0.2, 1.0), (0.3,))]
    assert len({store.header.checksum for store in stores}) == len({store.path for store in stores}) == 3
    header = ImageStore.open(stores[1].path).header
    assert header.latents == LatentScaling(0.2, 1.0) and header.latents.scale == 0.2
    back = np.asarray(stores[1].images, np.float32).transpose(0, 3, 1, 2) / 0.2 + 1.0
    np.testing.assert_allclose(back, z, rtol=2e-3, atol=2e-3)
    packed = stores[0].path
    assert _open(packed, tmp_path, scaling=None).latents == LatentScaling(0.2)
    with pytest.raises(ValueError, match=r"holds latents of scale 0\.2 and shift 0\.0, not latents of scale 0\.18215"):
        _open(packed, tmp_path)
    with pytest.raises(ValueError, match=r"holds latents of 6x6x4 .*, want 8x8x4"):
        _open(packed, tmp_path, size=8, scaling=None)
    np.save(tmp_path / "z.npy", z + np.float16(1))
    assert _open(tmp_path / "z.npy", tmp_path, scaling=LatentScaling(0.2)).header.checksum != stores[0].header.checksum


def test_stores_of_images_are_written_as_ever(tmp_path):
    """Version 1 without a word about latents; that of latents is one that older readers refuse."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = open_dataset(tmp_path, 4, cache_dir=tmp_path / "cache").path.read_bytes()
    assert images[8:12] == b"\1\0\0\0" and b"latents" not in images
    _save(tmp_path / "z.npy", _latents(1))
    path = _open(tmp_path / "z.npy", tmp_path).path
    data = bytearray(path.read_bytes())
    assert data[8:12] == b"\2\0\0\0"
    data[4096 + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        ImageStore.open(path).verify()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"z{suffix}"
    _save(path, _latents(40))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"z{re.escape(suffix)}' is damaged, or holds no latents"):
            latent_source(path, SCALING)


@pytest.mark.parametrize("value", [math.nan, math.inf, 60000.0])
def test_values_that_float16_cannot_hold(tmp_path, value):
    z = _latents(5)
    z[3, 1, 2, 2] = value
    _save(tmp_path / "z.npy", z)
    with pytest.raises(ValueError, match=r"latent 3 of '.*z\.npy' has a value that is not finite"):
        _open(tmp_path / "z.npy", tmp_path, scaling=LatentScaling(1.5))
    assert not list((tmp_path / "cache").iterdir())


def test_errors(tmp_path):
    def fails(message, *held, scaling=SCALING, size=6, **options):
        with pytest.raises(ValueError, match=message):
            _open(tmp_path / "z.npy", tmp_path, scaling=scaling, size=size, **options)

    for scaling in (LatentScaling(0.0), LatentScaling(-1.0), LatentScaling(math.nan)):
        _save(tmp_path / "z.npy", _latents(2))
        fails("the scale of latents is", scaling=scaling)
    fails("the shift of latents is inf", scaling=LatentScaling(1.0, math.inf))
    fails(r"holds latents: say how they are scaled.*--latent-scale", scaling=None)
    fails(r"are 4x6x6 \(C, h, w\), which cannot be resized: want image_size 6 and channels 4", size=8)
    fails("which cannot be resized", channels=3)
    fails("only those are decoded on the fly", decoding="on-the-fly")
    for z, message in (
        (np.zeros((2, 4, 6, 5), np.float16), "are 6x5, want them square"),
        (np.zeros((2, 4, 6, 6), np.uint8), r"holds uint8 \[2, 4, 6, 6\], want latents \[n, C, h, w\] of float16"),
        (np.zeros((6, 6), np.float16), r"holds float16 \[6, 6\]"),
        (np.zeros((0, 4, 6, 6), np.float16), r"holds float16 \[0, 4, 6, 6\]"),
    ):
        _save(tmp_path / "z.npy", z)
        fails(message)
    for labels, held in (
        (np.array([1.0, 2.0]), "float64"),
        (np.array([1]), r"int64 \[1\]"),
        (np.array([0, -1]), "int64"),
    ):
        _save(tmp_path / "z.npy", _latents(2), labels)
        fails(rf"labels of .* are {held}.*, want integers from 0, one for each of 2 latents")
    np.savez(tmp_path / "other.npz", x=_latents(2))
    with pytest.raises(ValueError, match="holds no latents"):
        latent_source(tmp_path / "other.npz", SCALING)
    with pytest.raises(FileNotFoundError):
        latent_source(tmp_path / "missing.npy", SCALING)


def test_folders_that_do_not_fit(tmp_path):
    folder = tmp_path / "z"
    _save(folder / "a.npy", _latents(2))
    _save(folder / "b.npy", _latents(2, channels=8))
    with pytest.raises(ValueError, match=r"b\.npy' are \[8, 6, 6\] \(C, h, w\), of .*a\.npy' \[4, 6, 6\]"):
        find_source(folder, latents=SCALING)
    _save(folder / "b.npy", _latents(2), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"1 of 2 files of latents have no labels, first .*a\.npy"):
        find_source(folder, latents=SCALING)
    (folder / "b-labels.npy").unlink()
    _save(folder / "class" / "c.npy", _latents(2))
    with pytest.raises(ValueError, match="both at its top and in sub-folders"):
        find_source(folder, latents=SCALING)
    (folder / "class").rename(tmp_path / "class")
    with pytest.raises(ValueError, match="holds no latents: leave out"):
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
        find_source(tmp_path / "x.png", latents=SCALING)


def test_files_of_a_folder_are_not_left_out(tmp_path):
    z = _latents(6)
    folder, apart = tmp_path / "z", tmp_path / "apart"
    _save(folder / "a" / "0.npy", z[:2])
    _save(apart / "1.npy", z[2:4])
    (folder / "a" / "0.npy").rename(folder / "a" / "0.NPY")
    folder.joinpath("a", "more").symlink_to(apart)
    _save(folder / "b" / "2.npz", z[4:])
    _save(folder / "b" / ".old" / "2.npy", z)
    store = _open(folder, tmp_path)
    assert store.labels.tolist() == [0, 0, 0, 0, 1, 1] and np.array_equal(store.images, _x0(z))
    folder.joinpath("b", "3.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(FileNotFoundError, match=r"3\.npy"):
        find_source(folder, latents=SCALING)


def test_labels_are_not_left_out(tmp_path):
    """Labels that belong to no latents used to be passed over, which left all without classes."""
    _save(tmp_path / "z.npz", _latents(2))
    np.save(tmp_path / "z-labels.npy", np.array([0, 1]))
    for name in ("z.npz", "."):
        with pytest.raises(ValueError, match=r"z-labels\.npy' belongs to no file of latents.*under the name 'labels'"):
            latent_source(tmp_path / name, SCALING)
    _save(tmp_path / "z.npy", _latents(2))
    assert latent_source(tmp_path / "z.npz", SCALING).class_names == ()
    assert latent_source(tmp_path / "z.npy", SCALING).class_names == ("0", "1")
    (tmp_path / "z-labels.npy").unlink()
    (tmp_path / "z-labels.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(FileNotFoundError, match="z-labels"):
        latent_source(tmp_path / "z.npy", SCALING)


def test_labels_of_any_integer_type(tmp_path):
    """numpy joins int64 and uint64 to float64."""
    for name, dtype in (("a", np.uint64), ("b", np.int64)):
        _save(tmp_path / f"{name}.npy", _latents(2), np.array([3, 10], dtype))
    source = latent_source(tmp_path, SCALING)
    assert source.class_names == ("03", "10") and source.labels.tolist() == [0, 1, 0, 1]
    save_file({"latents": torch.zeros(1, 4, 6, 6), "labels": torch.zeros(1).bfloat16()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors' is damaged, or holds no latents"):
        latent_source(tmp_path / "c.safetensors", SCALING)
