"""The sets of images that evaluate compares: drawn from runs, or read from folders, stores and data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from maskdm_fast.commands.drawing import DrawOptions, draw
from maskdm_fast.data import ImageStore, is_tars, open_dataset
from maskdm_fast.eval import subset_indices
from maskdm_fast.train.weights import Weights, is_exported, load_weights

FREE_IMAGE_SIZE = 64


@dataclass(frozen=True)
class ImageSet:
    """Images with the classes they have or were drawn for.

    Attributes:
        name: as it was given.
        images: uint8 ``[n, h, w, C]``.
        labels: int64 ``[n]``; None where there are no classes.
        class_names: in the order of the labels; empty where there are none.
        key: identifies the images, for caches of their features; None where they were drawn.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    class_names: Sequence[str]
    key: str | None


@dataclass(frozen=True)
class Side:
    """What one argument of evaluate stands for, before images of it are read or drawn.

    Attributes:
        name: as it was given.
        weights: of a run; None where images are read.
    """

    name: str
    weights: Weights | None

    @classmethod
    def find(cls, name: str, which: Literal["ema", "raw"]) -> "Side":
        """A run, recipe or checkpoint folder or an exported file if there are weights in `name`, else a data set.

        Raises:
            FileNotFoundError: there is nothing of this name.
            CheckpointError: there are weights, but damaged ones.
            ValueError: of a run on latents, or of a file with the other weights.
        """
        path = Path(name)
        if not (path.exists() or name == "emoji" or is_tars(name)):
            raise FileNotFoundError(f"there is no run, folder or file {name!r}")
        if not (path.is_dir() or is_exported(path)):
            return cls(name, None)
        try:
            weights = load_weights(name, which)
        except FileNotFoundError:
            return cls(name, None)
        if weights.config.latents is not None:
            raise ValueError(
                f"{name} was trained on latents: draw some with maskdm-fast sample, decode them with their "
                "autoencoder, and evaluate the folder of images"
            )
        return cls(name, weights)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Side in pixels and channels of the images, where `name` decides them."""
        if self.weights is not None:
            return self.weights.config.model.image_size, self.weights.config.model.channels
        if Path(self.name).suffix == ".store" and Path(self.name).is_file():
            store = ImageStore.open(self.name)
            return store.image_size, store.channels
        return None

    def open(self, shape: tuple[int, int | None], *, cache_dir: str, skip_bad: bool) -> ImageStore:
        """The store of a side without weights; ValueError if it holds latents."""
        # Of tar shards a few thousand images are wanted, not all of them decoded.
        decoding = "on-the-fly" if is_tars(self.name) else "packed"
        store = open_dataset(
            self.name, shape[0], channels=shape[1], cache_dir=cache_dir, skip_bad=skip_bad, decoding=decoding
        )
        if store.latents is not None:
            raise ValueError(f"{self.name} holds latents: evaluate the images that they were made of")
        return store


def common_shape(sides: Sequence[Side], image_size: int | None) -> tuple[int, int | None]:
    """Side in pixels and channels (None: each set's own) at which all sides are compared.

    Raises:
        ValueError: two sides have fixed shapes that differ, or one differs from `image_size`.
    """
    fixed = [(side.name, side.shape) for side in sides if side.shape is not None]
    if not fixed:
        return image_size or FREE_IMAGE_SIZE, None
    name, shape = fixed[0]
    for other, other_shape in fixed[1:]:
        if other_shape != shape:
            raise ValueError(
                f"{name} has images of {_words(shape)}, {other} of {_words(other_shape)}: score them apart"
            )
    if image_size not in (None, shape[0]):
        raise ValueError(f"--image-size is {image_size}, but {name} has images of {_words(shape)}")
    return shape


def read(store: ImageStore, name: str, num_images: int, *, seed: int) -> ImageSet:
    """At most `num_images` of a store, at random, since files are in the order of their names, and of their classes."""
    if num_images >= len(store):
        return ImageSet(name, store.images, _labels(store, slice(None)), store.class_names, store.header.checksum)
    chosen = subset_indices(len(store), num_images, seed=seed).sort().values
    key = f"{store.header.checksum}|subset" if seed == 0 else None
    return ImageSet(name, store.batch(chosen)[0], _labels(store, chosen), store.class_names, key)


def drawn(
    side: Side, options: DrawOptions, num_images: int, *, like: ImageSet | None = None, first_slot: int = 0
) -> ImageSet:
    """Images of a run; of a class-conditional one with the classes of `like` in its proportions, if it has them."""
    names = side.weights.class_names
    labels = None
    if names:
        labels = (torch.arange(num_images) + first_slot) % len(names)
        if like is not None and like.labels is not None and set(like.class_names) == set(names):
            # The distances see the proportions of classes, so an even mixture would be scored against an uneven one.
            order = subset_indices(len(like.labels), len(like.labels), seed=0)
            repeated = order.repeat(-(-num_images // len(order)))[:num_images]
            labels = relabel(like.labels[repeated], like.class_names, names)
    images = draw(side.weights, options, num_images, first_slot=first_slot, labels=labels)
    return ImageSet(side.name, images, labels, names, None)


def relabel(labels: Tensor, names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Labels that count the classes in the order of `wanted` instead of `names`, which it must contain."""
    return torch.tensor([wanted.index(name) for name in names])[labels]


def _labels(store: ImageStore, chosen: Tensor | slice) -> Tensor | None:
    return store.labels[chosen] if store.class_names else None


def _words(shape: tuple[int, int]) -> str:
    return f"{shape[0]} px in {'grey' if shape[1] == 1 else f'{shape[1]} channels'}"
