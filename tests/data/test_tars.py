import io
import json
import logging
import multiprocessing
import os
import re
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from maskdm_fast.data import (
    DataOrder,
    ImageStore,
    StoreError,
    UnreadableImagesError,
    find_source,
    open_dataset,
    pack,
    tar_source,
)
from maskdm_fast.data import tars as tars_module

SIZE = 8


def _png(number, size=SIZE):
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _write(path, members):
    """A tar file of pairs (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """Three shards by WebDataset's own writer: 7, 0 and 5 samples of 4 classes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    number = 0
    for shard, count in enumerate((7, 0, 5)):
        with webdataset.TarWriter(str(folder / f"set-{shard:03d}.tar")) as writer:
            for _ in range(count):
                writer.write({"__key__": f"dir/{number:04d}", "cls": number * 3 % 4, "png": _png(number)})
                number += 1
    return folder


def _open(name, tmp_path, size=SIZE, **options):
    return open_dataset(name, size, cache_dir=tmp_path / "cache", **options)


def test_samples_are_those_that_webdataset_reads(folder):
    source = tar_source(folder)
    pattern = str(folder / "set-{000..002}.tar")
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False))
    assert len(theirs) == len(source.labels) == 12
    for index, sample in enumerate(theirs):
        assert source.open(index).read() == sample["png"]
        assert source.class_names[source.labels[index]] == sample["cls"].decode()
        shard, name = source.item(index).split(": ")
        assert sample["__url__"].endswith(shard) and name == sample["__key__"] + ".png"


def test_packed_and_on_the_fly_are_bit_identical(folder, tmp_path):
    packed = _open(folder, tmp_path)
    live = _open(str(folder / "set-{000..002}.tar"), tmp_path, decoding="on-the-fly")
    assert packed.is_mapped and not live.is_mapped
    assert (packed.images.shape, packed.nbytes) == (live.images.shape, live.nbytes) == ((12, 8, 8, 3), 12 * 192)
    assert packed.class_names == live.class_names == ["0", "1", "2", "3"]
    indices = torch.tensor([11, 0, 7, 7, 3])
    for one, other in zip(packed.batch(indices), live.batch(indices), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert packed.labels.tolist() == live.labels.tolist() == [number * 3 % 4 for number in range(12)]
    assert np.array_equal(np.asarray(live.images), packed.images)
    for key in (slice(2, 9, 3), slice(-2, None), 4, -1, [1, 0], np.arange(12) % 5 == 0, []):
        assert np.array_equal(live.images[key], packed.images[key])
    live.verify()
    for wrong in (torch.tensor([12]), torch.tensor([-1])):
        with pytest.raises(IndexError, match=r"want 0\.\.11"):
            live.batch(wrong)
    with pytest.raises(IndexError, match="out of range for 12 images"):
        live.images[12]
    for size, channels in ((4, 3), (8, 1)):
        one, other = (
            _open(folder, tmp_path, size, channels=channels, decoding=decoding) for decoding in ("packed", "on-the-fly")
        )
        assert np.array_equal(np.asarray(one.images), np.asarray(other.images))


def test_any_step_is_reached_without_those_before_it(folder, tmp_path, monkeypatch):
    """The batch of a step is a function of seed and step: a fresh process reads its own images and no others."""
    whole = _open(folder, tmp_path, decoding="on-the-fly")
    order = DataOrder(len(whole), seed=5)
    batches = [whole.batch(order.indices(step * 5, 5)) for step in range(7)]  # over the end of two epochs
    opened = []
    real = tars_module.TarSource.open

    def count(self, index):
        opened.append(index)
        return real(self, index)

    monkeypatch.setattr(tars_module.TarSource, "open", count)
    for step in (6, 2):
        opened.clear()
        again = _open(folder, tmp_path, decoding="on-the-fly")
        indices = DataOrder(len(again), seed=5).indices(step * 5, 5)
        images, labels = again.batch(indices)
        assert torch.equal(images, batches[step][0]) and torch.equal(labels, batches[step][1])
        assert sorted(opened) == sorted(indices.tolist())


def test_the_index_is_built_once(folder, tmp_path, monkeypatch, caplog):
    calls = []
    source = tar_source(folder, cache_dir=tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(tars_module, "_index_shard", None)  # would raise if called
    again = tar_source(folder, cache_dir=tmp_path / "cache")
    assert again.fingerprint == source.fingerprint and np.array_equal(again.offsets, source.offsets)
    monkeypatch.undo()
    (path,) = (tmp_path / "cache").glob("*.index.npz")
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(tar_source(folder, cache_dir=tmp_path / "cache").offsets, source.offsets)
    assert "indexing again" in caplog.text
    _write(folder / "set-003.tar", [("a.png", _png(0)), ("a.cls", b"1")])
    assert len(tar_source(folder, cache_dir=tmp_path / "cache").labels) == 13


def _open_and_sum(folder, cache, decoding, queue):
    store = open_dataset(folder, SIZE, cache_dir=cache, decoding=decoding, shard_bytes=600)
    queue.put((int(np.asarray(store.images, np.int64).sum()), store.header.checksum))


@pytest.mark.parametrize("decoding", ["packed", "on-the-fly"])
def test_processes_at_the_same_time(folder, tmp_path, decoding):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_open_and_sum, args=(folder, tmp_path / "cache", decoding, queue)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1
    assert found.pop()[0] == np.asarray(_open(folder, tmp_path).images, np.int64).sum()


def test_the_checksum_is_that_of_the_content(folder, tmp_path):
    def checksums(size=SIZE, channels=3):
        return [
            _open(folder, tmp_path, size, channels=channels, decoding=decoding).header.checksum
            for decoding in ("packed", "on-the-fly")
        ]

    seen = checksums()
    assert seen == checksums()
    seen += checksums(4) + checksums(channels=1)
    data = bytearray((folder / "set-000.tar").read_bytes())
    start = data.index(_png(3))
    data[start + 60] ^= 1
    (folder / "set-000.tar").write_bytes(data)
    live = _open(folder, tmp_path, decoding="on-the-fly")
    assert live.header.checksum not in seen and len(set(seen)) == 6
    _write(folder / "set-001.tar", [("x.png", _png(99)), ("x.cls", b"2")])
    with pytest.raises(StoreError, match=r"set-001\.tar' has changed since it was indexed"):
        live.verify()


@pytest.mark.parametrize(
    ("files", "names", "labels"),
    [
        ({"cls": [b"10", b"9", b"10"]}, ("09", "10"), [1, 0, 1]),
        ({"cls": [b"1_2", b"12", b"1_2"]}, ("12", "1_2"), [1, 0, 1]),
        ({"cls": [b"9" * 19, b"-3", b"-3"]}, ("-3", "9" * 19), [1, 0, 0]),
        ({"cls": [b"dog", b"cat\n", b"dog"]}, ("cat", "dog"), [1, 0, 1]),
        ({"json": [b'{"label": 2}', b'{"label": 1}', b'{"label": 2}']}, ("1", "2"), [1, 0, 1]),
        ({"json": [b'{"class": "b", "w": 8}', b'{"cls": "a"}', b'{"label": "b"}']}, ("a", "b"), [1, 0, 1]),
        ({"json": [b'{"w": 8}', b"[1]", b'{"label": null}']}, (), [-1, -1, -1]),
        ({"json": [b'{"label": null, "class": 3}', b'{"label": 12.0}', b'{"cls": 3}']}, ("03", "12"), [0, 1, 0]),
        ({"json": [b'{"label": true}', b'{"label": false}', b'{"label": true}']}, ("False", "True"), [1, 0, 1]),
        (
            {"json": [b'{"label": 0.3}', b'{"label": [1]}', b'{"label": ""}'], "cls": [b"", b"\n", b""]},
            (),
            [-1, -1, -1],
        ),
        ({"txt": [b"cat", b"cat", b"cat"]}, ("cat",), [0, 0, 0]),
        ({"txt": [b"a cat", b"two cats", b"a dog"]}, (), [-1, -1, -1]),
        ({"txt": [b"a cat", b"two cats", b"a dog"], "cls": [b"0", b"0", b"1"]}, ("0", "1"), [0, 0, 1]),
        ({}, (), [-1, -1, -1]),
    ],
)
def test_labels(tmp_path, files, names, labels):
    members = [
        (f"{number}.{suffix}", data)
        for number in range(3)
        for suffix, data in (("jpg", _png(number)), *((suffix, values[number]) for suffix, values in files.items()))
    ]
    _write(tmp_path / "a.tar", members)
    source = find_source(tmp_path / "a.tar")
    assert source.class_names == names and source.labels.tolist() == labels


def test_labels_named_like_the_image(tmp_path):
    members = [("a.left.png", _png(1)), ("a.left.cls", b"7"), ("a.cls", b"5"), ("b.left.png", _png(2)), ("b.cls", b"6")]
    _write(tmp_path / "a.tar", members)
    assert [tar_source(tmp_path / "a.tar").class_names[label] for label in (1, 0)] == ["7", "6"]


def test_what_is_no_sample_is_passed_over(tmp_path, caplog):
    members = [
        ("__meta__/x.png", b""),
        ("./a.b/1.png", _png(1)),
        ("./a.b/1.caption.txt", b"x"),
        ("readme", b"no suffix"),
        ("notes.txt", b"no image"),
        (".hidden.png", b"junk"),
        ("dir/._1.png", b"junk"),
        ("long/" + 120 * "n" + "/2.PNG", _png(2)),
    ]
    _write(tmp_path / "a.tar", members)
    with caplog.at_level(logging.WARNING):
        source = tar_source(tmp_path / "a.tar")
    assert "passed over 1 labels without an image, first notes" in caplog.text
    assert [source.open(index).read() for index in range(2)] == [_png(1), _png(2)]
    assert source.item(0) == "a.tar: ./a.b/1.png"


def test_shards_that_a_folder_would_leave_out(folder):
    (folder / "set-003.tar.gz").touch()
    with pytest.raises(ValueError, match=r"holds compressed shards beside others, first set-003\.tar\.gz: unpack all"):
        find_source(folder)
    (folder / "set-003.tar.gz").unlink()
    (folder / "more").mkdir()
    (folder / "more" / "set-003.TAR").touch()
    with pytest.raises(ValueError, match=r"both at its top \(3\) and in sub-folders \(1\)"):
        find_source(folder)
    (folder / "more" / "set-003.TAR").rename(folder / "set-003.TAR")
    with pytest.raises(ValueError, match=r"set-003\.TAR' is damaged"):
        find_source(folder)
    (folder / "set-003.TAR").unlink()
    os.symlink("missing", folder / "set-004.tar")
    with pytest.raises(FileNotFoundError, match=r"1 of 4 tar shards are not there: first .*set-004\.tar"):
        find_source(folder)


def _cut(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, at: data[: at - 450], "is damaged"),  # in an image
        (lambda data, at: data[:at], "is damaged or cut off at byte"),  # between two files
        (lambda data, at: data[: at + 9] + b"?" + data[at + 10 :], "is damaged or cut off at byte"),  # in a header
        (lambda data, at: data[:at] + bytes(1024) + data[at + 1024 :], "ends at byte 2048, but more follows"),  # a hole
        (lambda data, at: b"\x1f\x8b" + data[2:], "is damaged, compressed, or no tar file"),
        (lambda data, at: b"", "is damaged, compressed, or no tar file"),
    ],
)
def test_damaged_shards(folder, tmp_path, damage, message):
    path = folder / "set-000.tar"
    _write(path, [(f"{number}.png", _png(number)) for number in range(4)])
    with tarfile.open(path) as tar:
        at = tar.getmembers()[2].offset
    path.write_bytes(damage(path.read_bytes(), at))
    with pytest.raises(ValueError, match=rf"set-000\.tar' {message}.*fetch it again"):
        _open(folder, tmp_path)
    assert not list((tmp_path / "cache").glob("*.npz"))


def test_archives_end_to_end(folder):
    """The second one used to be lost: tarfile and webdataset stop at the end of the first."""
    first, second = ((folder / f"set-00{number}.tar").read_bytes() for number in (0, 2))
    (folder / "set-000.tar").write_bytes(first + second)
    with pytest.raises(ValueError, match=r"set-000\.tar' ends at byte \d+, but more follows.*tar --concatenate"):
        tar_source(folder)
    (folder / "set-000.tar").write_bytes(first + bytes(1000))
    assert len(tar_source(folder).labels) == 12


def test_damaged_images(folder, tmp_path):
    members = [("a/1.png", _png(1)), ("a/1.cls", b"0"), ("a/2.png", _cut(_png(2))), ("a/2.cls", b"3")]
    _write(folder / "set-001.tar", members)
    with pytest.raises(
        UnreadableImagesError, match=r"1 of 14 images of 'shards' cannot be read:\n  set-001.tar: a/2.png"
    ):
        _open(folder, tmp_path)
    live = _open(folder, tmp_path, decoding="on-the-fly")
    assert live.batch(torch.tensor([7]))[1].tolist() == [0]
    with pytest.raises(UnreadableImagesError, match=r"set-001.tar: a/2.png"):
        live.batch(torch.tensor([7, 8]))
    packed, skipping = (
        _open(folder, tmp_path, skip_bad=True, decoding=decoding) for decoding in ("packed", "on-the-fly")
    )
    assert len(packed) == len(skipping) == 13
    assert packed.header.skipped == skipping.header.skipped and "a/2.png" in packed.header.skipped[0][0]
    assert np.array_equal(np.asarray(skipping.images), packed.images)
    assert skipping.labels.tolist() == packed.labels.tolist()
    assert skipping.header.checksum != live.header.checksum
    (found,) = (tmp_path / "cache").glob("*.bad.json")
    assert [index for index, _ in json.loads(found.read_text())] == [8]


def test_a_shard_that_shrank_since(folder, tmp_path):
    live = _open(folder, tmp_path, decoding="on-the-fly")
    (folder / "set-002.tar").write_bytes(b"")
    with pytest.raises(OSError, match=r"set-002\.tar' is shorter than when it was indexed"):
        live.batch(torch.tensor([11]))


def test_errors(folder, tmp_path):
    image = ("1.png", _png(1))
    for members, message in (
        ([], "no images in"),
        ([image, ("1.jpg", _png(1))], r"sample '1' has several images \(png, jpg\)"),
        ([image, ("1.png", _png(2)), ("2.png", _png(3))], r"sample '1' has \.png twice \(1\.png\), want it once"),
        ([image, ("1.cls", b"0"), ("1.CLS", b"1")], r"sample '1' has \.cls twice \(1\.CLS\)"),
        ([image, ("2.png", _png(2)), ("1.cls", b"0"), ("2.cls", b"1")], "label and image of sample '1' do not follow"),
        ([("1.json", b"{}"), ("2.png", _png(2)), image], "label and image of sample '1' do not follow"),
        ([image, ("1.cls", b"0"), ("2.png", _png(2))], r"1 of 2 samples have no label, first '2'"),
        ([image, ("1.json", b"{")], r"1\.json is damaged"),
        ([image, ("1.cls", b"\xff\xfe")], r"1\.cls is damaged"),
    ):
        _write(tmp_path / "a.tar", members)
        with pytest.raises(ValueError, match=message):
            tar_source(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match=re.escape("2 of 5 tar shards are not there: first")):
        tar_source(str(folder / "set-{000..004}.tar"))
    with pytest.raises(FileNotFoundError, match="1 of 1 tar shards"):
        find_source(tmp_path / "missing.tar")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "x.png")
    with pytest.raises(ValueError, match="only those are decoded on the fly"):
        _open(tmp_path / "images", tmp_path, decoding="on-the-fly")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("suffix", ["png", "cls"])
def test_members_whose_bytes_lie_elsewhere(tmp_path, kind, suffix):
    """Links used to be left out without a word, and of sparse files other bytes were read."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("1.png", _png(1)), ("1.cls", b"0"), ("2.png", _png(2)), ("2.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name == f"2.{suffix}":
                info.type, info.linkname = kind, f"1.{suffix}"
                if kind != tarfile.GNUTYPE_SPARSE:
                    info.size, data = 0, b""
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=rf"2\.{suffix} is a link or sparse.*--dereference --hard-dereference"):
        tar_source(tmp_path / "a.tar")


def test_a_bad_image_is_counted_once_and_told_alike_everywhere(folder, tmp_path):
    """By index, not by place in the batch; and the reason names no address in memory, so stores are the same bytes."""
    _write(folder / "set-001.tar", [("1.png", b"no image"), ("1.cls", b"0")])
    live = _open(folder, tmp_path, decoding="on-the-fly")
    with pytest.raises(UnreadableImagesError, match="1 of 13 images") as caught:
        live.batch(torch.tensor([7, 0, 7, 7]))
    want = ("set-001.tar: 1.png", "UnidentifiedImageError: cannot identify image file")
    assert caught.value.files == [want]
    stores = [pack(tar_source(folder), tmp_path / name, SIZE, skip_bad=True).path for name in ("a.store", "b.store")]
    assert stores[0].read_bytes() == stores[1].read_bytes() and ImageStore.open(stores[0]).header.skipped == (want,)
