import importlib.util
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from maskdm_fast.data import UnreadableImagesError, decode_image, emoji_source, find_source, folder_source, pack


def _save(path, colour=(200, 30, 60), size=(6, 6), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def test_classes_are_first_level_folders_in_sorted_order(tmp_path):
    for name in ("b/2.png", "b/1.PNG", "a/deep/er/3.jpg", "a/1.webp"):
        _save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "._1.jpg").write_bytes(b"junk that macOS leaves")
    for name in (".thumbnails/t.png", "a/.ipynb_checkpoints/1.png", "b/deep/.x/y/1.png"):
        _save(tmp_path / name)
    source = folder_source(tmp_path)
    assert source.files == ("a/1.webp", "a/deep/er/3.jpg", "b/1.PNG", "b/2.png")
    assert source.labels == (0, 0, 1, 1)
    assert source.class_names == ("a", "b")


def test_flat_folder_has_no_classes(tmp_path):
    for name in ("b.png", "a.png"):
        _save(tmp_path / name)
    source = find_source(tmp_path)
    assert (source.files, source.labels, source.class_names) == (("a.png", "b.png"), (-1, -1), ())


def test_links_are_followed_at_every_level(tmp_path):
    folder, apart = tmp_path / "set", tmp_path / "apart"
    for path in (folder / "a" / "1.png", apart / "2.png", apart / "deep" / "3.png"):
        _save(path)
    os.symlink(apart, folder / "b")
    os.symlink(apart, folder / "a" / "more")
    os.symlink(apart / "2.png", folder / "a" / "4.png")
    source = folder_source(folder)
    assert source.files == ("a/1.png", "a/4.png", "a/more/2.png", "a/more/deep/3.png", "b/2.png", "b/deep/3.png")
    assert source.labels == (0, 0, 0, 0, 1, 1)
    os.symlink(folder, apart / "deep" / "round")
    with pytest.raises(ValueError, match=r"round' links to a folder that it lies in: remove the link"):
        folder_source(folder)


def test_links_to_nothing(tmp_path):
    """An image among them is one that cannot be read; anything else might have been a class."""
    folder = tmp_path / "set"
    for name in ("a/1.png", "b/2.png"):
        _save(folder / name)
    os.symlink(tmp_path / "gone.png", folder / "a" / "3.png")
    with pytest.raises(UnreadableImagesError, match=r"1 of 3 .*\n  a/3\.png: FileNotFoundError: No such file or dir"):
        pack(folder_source(folder), tmp_path / "a.store", 6)
    store = pack(folder_source(folder), tmp_path / "a.store", 6, skip_bad=True)
    assert store.labels.tolist() == [0, 1]
    assert store.header.skipped == (("a/3.png", "FileNotFoundError: No such file or directory"),)
    before = folder_source(folder).fingerprint
    _save(tmp_path / "gone.png")
    assert folder_source(folder).fingerprint != before
    (folder / "a" / "3.png").unlink()
    os.symlink(tmp_path / "unmounted", folder / "c.Cats")
    with pytest.raises(FileNotFoundError, match=r"c\.Cats' links to nothing"):
        folder_source(folder)


def test_two_kinds_in_one_folder_are_refused(tmp_path):
    """Of any two kinds one used to be taken without a word, down to two images beside thirty shards."""
    empty = {"images": ("x.png",), "latents": ("x.npy", "deep/er/x.npz", "x.safetensors")}
    empty |= {"tar shards": ("x.tar", "deep/x.tar"), "idx files": ("train-images-idx3-ubyte",)}
    for number, (one, names) in enumerate(empty.items()):
        for other, others in list(empty.items())[:number]:
            for name in names:
                for beside in others:
                    folder = tmp_path / "set"
                    for path in (folder / name, folder / beside):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.touch()
                    with pytest.raises(ValueError, match="of which only one kind can be taken") as caught:
                        find_source(folder)
                    assert one in str(caught.value) and other in str(caught.value)
                    shutil.rmtree(folder)


def test_a_store_is_no_source(tmp_path):
    _save(tmp_path / "set" / "1.png")
    pack(folder_source(tmp_path / "set"), tmp_path / "a.store", 6)
    with pytest.raises(ValueError, match=r"a\.store' is packed already: give it to --data as it is"):
        find_source(tmp_path / "a.store")


def test_fingerprint_sees_every_change(tmp_path):
    _save(tmp_path / "a" / "1.png")
    seen = {folder_source(tmp_path).fingerprint}
    assert folder_source(tmp_path).fingerprint in seen
    _save(tmp_path / "a" / "2.png")
    seen.add(folder_source(tmp_path).fingerprint)
    _save(tmp_path / "a" / "2.png", size=(9, 9))
    seen.add(folder_source(tmp_path).fingerprint)
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "3.png")
    seen.add(folder_source(tmp_path).fingerprint)
    assert len(seen) == 4


def test_folder_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"a folder of images, idx files, tar shards, latents, a \.store, or 'emoji'"
    ):
        folder_source(tmp_path / "missing")
    with pytest.raises(ValueError, match="no images below"):
        folder_source(tmp_path)
    _save(tmp_path / "top.png")
    with pytest.raises(NotADirectoryError, match="is a file"):
        folder_source(tmp_path / "top.png")
    _save(tmp_path / "cats" / "1.png")
    with pytest.raises(ValueError, match=r"at its top \(1\) and in sub-folders \(cats\)"):
        folder_source(tmp_path)


def test_emoji_counts():
    source = emoji_source()
    assert len(source.files) == len(set(source.files)) == 1949
    counts = {name: source.labels.count(label) for label, name in enumerate(source.class_names)}
    assert counts == {
        "Activities": 85,
        "Animals & Nature": 153,
        "Flags": 269,
        "Food & Drink": 135,
        "Objects": 262,
        "People & Body": 385,
        "Smileys & Emotion": 168,
        "Symbols": 223,
        "Travel & Places": 218,
        "Other": 51,
    }
    assert "CC-BY 4.0" in source.attribution and "Twemoji" in source.attribution
    by_file = dict(zip(source.files, source.labels, strict=True))
    for name, category in (("1f600", "Smileys & Emotion"), ("23-20e3", "Symbols"), ("1f1eb-1f1f7", "Flags")):
        assert source.class_names[by_file[f"{name}.png"]] == category


def test_emoji_package_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'maskdm_fast\[train\]'"):
        emoji_source()


@pytest.mark.parametrize(
    ("mode", "colour", "want"),
    [
        ("RGB", (200, 30, 60), (200, 30, 60)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x5A12, (0x5A, 0x5A, 0x5A)),
        ("RGBA", (200, 30, 60, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 255, 51), (204, 224, 255)),
        ("LA", (0, 51), (204, 204, 204)),
    ],
)
def test_modes_become_rgb_on_white(tmp_path, mode, colour, want):
    _save(tmp_path / "a.png", colour, mode=mode)
    image = decode_image(tmp_path / "a.png", 4)
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - want).max() <= 1


@pytest.mark.parametrize(("largest", "values"), [(65535, (0, 0x5A12, 65535)), (1023, (0, 0x169, 1023))])
def test_pgm_of_16_bits_keeps_its_upper_eight(tmp_path, largest, values):
    pixels = np.tile(np.array(values, ">u2"), (3, 1))
    (tmp_path / "binary.pgm").write_bytes(b"P5 3 3 %d\n" % largest + pixels.tobytes())
    (tmp_path / "plain.pgm").write_text(f"P2 3 3 {largest}\n" + " ".join(map(str, pixels.ravel())))
    for name in ("binary.pgm", "plain.pgm"):
        assert decode_image(tmp_path / name, 3, channels=1)[0, :, 0].tolist() == [0, 0x5A, 255]


def test_palette_with_transparency_and_cmyk(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "p.png", transparency=0)
    out = decode_image(tmp_path / "p.png", 4)
    assert out[0, 0].tolist() == [255, 255, 255] and out[2, 2].tolist() == [10, 20, 30]
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert decode_image(tmp_path / "c.jpg", 4).min() >= 250


def test_one_channel_is_the_luma(tmp_path):
    _save(tmp_path / "a.png", (200, 30, 60))
    image = decode_image(tmp_path / "a.png", 4, channels=1)
    assert (
        image.shape == (4, 4, 1) and np.abs(image.astype(int) - round(0.299 * 200 + 0.587 * 30 + 0.114 * 60)).max() <= 1
    )


def test_transparent_edges_do_not_darken(tmp_path):
    # Fully transparent pixels are black underneath: resizing before compositing would bleed that into the edge.
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (16, 16, 48, 48))
    image.save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", 16).min() == 255


def test_centre_crop_and_exif_orientation(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 5))
    image.paste((0, 0, 255), (10, 5, 20, 10))
    image.save(tmp_path / "wide.png")
    out = decode_image(tmp_path / "wide.png", 10)
    assert out[2, 5].tolist() == [0, 255, 0] and out[8, 5].tolist() == [0, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode_image(tmp_path / "turned.png", 10), out[::-1, ::-1])


def test_float_images_have_no_known_range(tmp_path):
    _save(tmp_path / "a.tif", 0.5, mode="F")
    _save(tmp_path / "b.tif", 70000, mode="I")
    for name, mode in (("a.tif", "F"), ("b.tif", "I")):
        with pytest.raises(ValueError, match=f"pixel mode {mode}"):
            decode_image(tmp_path / name, 4)
