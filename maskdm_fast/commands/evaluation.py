"""Score sets of images against a reference: what is measured, and where it is written."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from maskdm_fast.commands.drawing import DrawOptions
from maskdm_fast.commands.image_sets import ImageSet, Side, common_shape, drawn, read, relabel
from maskdm_fast.commands.out_files import check_file
from maskdm_fast.commands.score_table import class_table, set_table
from maskdm_fast.eval import (
    ClassScore,
    Copying,
    FeatureNetwork,
    Manifold,
    Neighbours,
    Scores,
    cached_features,
    class_scores,
    compare,
    compute_features,
    copying,
    floor_split,
    load_features,
    manifold,
    nearest,
    neighbours_grid,
    real_nearest,
    subset_indices,
)
from maskdm_fast.eval.grid import png_bytes
from maskdm_fast.eval.manifold import DENSITY_NEIGHBOURS
from maskdm_fast.train.checkpoint import write_json_atomic
from maskdm_fast.train.config import NO_DATA
from maskdm_fast.train.extras import require
from maskdm_fast.train.metrics import git_commit, machine, package_versions
from maskdm_fast.train.progress import step_bar
from maskdm_fast.train.runs import default_cache_dir
from maskdm_fast.train.scores import MAX_REFERENCE
from maskdm_fast.train.world import make_world

tyro = require("tyro")

_SHOWN_NEIGHBOURS = 4
_LEAST_REAL_NEIGHBOURS = 1000


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DrawOptions):
    """Score runs, or folders of images, against real images, or any of these against another.

    Printed per set: Frechet and kernel distance, precision and recall, density and coverage, and a hint of memorised
    images; beside them the floor, which is what real images get in their place. All sets are scored with the same
    number of images, since most scores depend on it: compare only equal numbers. Where classes are known, scores per
    class follow.

    example: maskdm-fast evaluate runs/a runs/b drawn-images --data photos --out scores.json
    """

    sets: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|DATA")]
    """What to score: run, recipe or checkpoint folders or exported files, from which images are drawn, or images in any
    form that --data takes in train: folders, .store files, idx files, emoji."""
    data: str | None = None
    """What to compare with: real images in any form that train takes, or another run. Default: what the run was
    trained on."""
    skip_bad: bool = False
    """Leave out image files that cannot be read (they are listed), instead of stopping. What a run was trained on is
    read as the run has read it."""
    num_images: int = 1000
    """Images of each set, at most: fewer where one of the sets holds fewer."""
    num_reference: int = MAX_REFERENCE
    """Images to compare with, at most; always the same ones. Of a run as many as of the sets are drawn."""
    features: str = "lite0"
    """Feature network: lite0 (EfficientNet-Lite0), or the path of the FID Inception as a TorchScript file."""
    image_size: int | None = None
    """Side in pixels at which sets are compared. Default: that of the runs and .store files; without any: 64."""
    neighbours: int = 16
    """Show so many samples beside their nearest images of --data, the nearest first, in neighbours.png; 0: none."""
    cache_dir: str | None = None
    """Where packed data sets and their features are kept; default as in train."""
    out: str | None = None
    """JSON file for the scores; pictures go beside it. Default: evaluation.json in the run that was scored, or in the
    working directory where that is not one run."""

    def check(self) -> None:
        """Raise ValueError for the first value that cannot work, or does not fit another."""
        super().check()
        if not self.sets:
            raise ValueError("name at least one run or set of images to score")
        for name, least in (("num_images", 2), ("num_reference", 4), ("neighbours", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, want at least {least}")


@dataclass(frozen=True)
class SetScore:
    """The scores of one set.

    Attributes:
        name: as it was given.
        checkpoint: from which it was drawn; None for images that were read.
        scores: Frechet and kernel distance, with their floors.
        manifold: at equal numbers of both sets; None where they are too few.
        copying: the hint of memorised images.
        classes: per class; None where classes are not known on both sides.
        num_manifold: images of either set behind `manifold`.
    """

    name: str
    checkpoint: str | None
    scores: Scores
    manifold: Manifold | None
    copying: Copying
    classes: list[ClassScore] | None
    num_manifold: int


def evaluate(options: EvaluateOptions) -> None:
    """Score sets of images, print a table, and write it as JSON."""
    options.check()
    sides = [Side.find(name, options.weights) for name in options.sets]
    reference_side = _reference_side(options, sides)
    out = _out(options, sides)
    check_file(out)
    shape = common_shape([*sides, reference_side], options.image_size)
    network = load_features(options.features).to(make_world(options.device).device)
    cache_dir = options.cache_dir or str(default_cache_dir())
    trained = [side.weights.config for side in sides if side.weights is not None]
    left_out = {config.data for config in trained if config.skip_bad}
    stores = {
        side.name: side.open(shape, cache_dir=cache_dir, skip_bad=options.skip_bad or side.name in left_out)
        for side in (*sides, reference_side)
        if side.weights is None
    }
    num_images = min([options.num_images, *(len(stores[side.name]) for side in sides if side.weights is None)])
    if reference_side.weights is None:
        reference = read(stores[reference_side.name], reference_side.name, options.num_reference, seed=0)
    else:
        # Other slots than those of the sets: runs with one seed would begin from the same noise.
        count = min(num_images, options.num_reference)
        reference = drawn(reference_side, options, count, first_slot=num_images)
    evaluation = Evaluation(reference, network, options.seed, cache_dir)
    results: list[SetScore] = []
    pictures: dict[str, bytes] = {}
    for number, side in enumerate(sides, start=1):
        if side.weights is None:
            images = read(stores[side.name], side.name, num_images, seed=options.seed)
        else:
            images = drawn(side, options, num_images, like=reference)
        checkpoint = None if side.weights is None else str(side.weights.checkpoint.path)
        result, found = evaluation.score(images, checkpoint)
        results.append(result)
        if options.neighbours:
            name = "neighbours.png" if len(sides) == 1 else f"neighbours-{number}-{_safe(side.name)}.png"
            pictures[name] = png_bytes(neighbours_grid(images.images, reference.images, found, options.neighbours))
    floor = evaluation.floor(num_images)
    print(set_table(results, floor, reference.name))
    for result in results:
        if result.classes is not None:
            print(class_table(result))
    _write(out, options, reference, results, floor, pictures)
    print(f"written to {out}" + (f", {', '.join(pictures)}" if pictures else ""))


class Evaluation:
    """Scores sets of images against one reference.

    Args:
        reference: what to compare with.
        network: of the features.
        seed: of the splits.
        cache_dir: where the features of sets that are read are kept.
    """

    def __init__(self, reference: ImageSet, network: FeatureNetwork, seed: int, cache_dir: str) -> None:
        self._reference, self._network, self._seed, self._cache_dir = reference, network, seed, cache_dir
        self._b = self._features(reference)
        self._last: Scores | None = None
        self._real: tuple[Tensor, Neighbours] | None = None

    def score(self, images: ImageSet, checkpoint: str | None) -> tuple[SetScore, Neighbours]:
        """The scores of a set, and the reference images nearest to each of its images."""
        a, b = self._features(images), self._b
        scores = self._last = compare(a, b, self._network, seed=self._seed, floor=self._last)
        count = min(len(a), len(b))
        found = nearest(a, b, self._network, k=min(_SHOWN_NEIGHBOURS, len(b)))
        chosen, real = self._real_neighbours(len(a))
        result = SetScore(
            name=images.name,
            checkpoint=checkpoint,
            scores=scores,
            manifold=self._manifold(a[self._subset(len(a), count)], b[self._subset(len(b), count)]),
            copying=copying(found.distances[:, 0], real.distances[:, 0]),
            classes=self._classes(images, a, found, chosen, real),
            num_manifold=count,
        )
        return result, found

    def floor(self, num_images: int) -> Manifold | None:
        """What real images get for precision and the like: as many as of the sets, or half of those there are."""
        first, rest = floor_split(num_images, len(self._b), seed=self._seed)
        return self._manifold(self._b[first], self._b[rest[: len(first)]])

    def _subset(self, num_images: int, count: int) -> Tensor:
        return subset_indices(num_images, count, seed=self._seed)

    def _real_neighbours(self, num_images: int) -> tuple[Tensor, Neighbours]:
        if self._real is None:
            count = min(len(self._b), max(num_images, _LEAST_REAL_NEIGHBOURS))
            chosen = self._subset(len(self._b), count)
            self._real = chosen, real_nearest(self._b, chosen)
        return self._real

    def _classes(
        self, images: ImageSet, a: Tensor, found: Neighbours, chosen: Tensor, real: Neighbours
    ) -> list[ClassScore] | None:
        reference = self._reference
        if images.labels is None or reference.labels is None or set(images.class_names) - set(reference.class_names):
            return None
        return class_scores(
            a,
            relabel(images.labels, images.class_names, reference.class_names),
            self._b,
            reference.labels,
            nearest=found.indices[:, 0],
            real_nearest=real.indices[:, 0],
            real_chosen=chosen,
            class_names=reference.class_names,
            seed=self._seed,
        )

    @staticmethod
    def _manifold(a: Tensor, b: Tensor) -> Manifold | None:
        return manifold(a, b) if min(len(a), len(b)) > DENSITY_NEIGHBOURS else None

    def _features(self, images: ImageSet) -> Tensor:
        with step_bar(f"features of {images.name}") as progress:
            if images.key is None:
                return compute_features(images.images, self._network, progress=progress)
            return cached_features(
                images.images, self._network, key=images.key, cache_dir=self._cache_dir, progress=progress
            )


def _reference_side(options: EvaluateOptions, sides: Sequence[Side]) -> Side:
    name = _reference_name(options, sides)
    try:
        return Side.find(name, options.weights)
    except FileNotFoundError as error:
        if options.data is not None:
            raise
        raise FileNotFoundError(
            f"{error}, which the run was trained on: --data must say where it is, or what else to compare with"
        ) from None


def _reference_name(options: EvaluateOptions, sides: Sequence[Side]) -> str:
    if options.data is not None:
        return options.data
    trained_on = {side.weights.config.data for side in sides if side.weights is not None} - {NO_DATA}
    if not trained_on:
        names = ", ".join(options.sets)
        raise ValueError(f"{names}: no run with a data set, so --data must say which real images to compare with")
    if len(trained_on) > 1:
        raise ValueError(
            f"the runs were trained on {', '.join(sorted(trained_on))}: --data must say which to compare with"
        )
    return trained_on.pop()


def _out(options: EvaluateOptions, sides: Sequence[Side]) -> Path:
    if options.out is not None:
        return Path(options.out)
    # Never into a folder of images: a picture there would be taken for one of them.
    one_run = len(sides) == 1 and sides[0].weights is not None and Path(sides[0].name).is_dir()
    return Path(sides[0].name if one_run else ".") / "evaluation.json"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.strip("/."))[-60:]


def _write(
    out: Path,
    options: EvaluateOptions,
    reference: ImageSet,
    results: list[SetScore],
    floor: Manifold | None,
    pictures: dict[str, bytes],
) -> None:
    record: dict[str, Any] = {
        "sets": [dataclasses.asdict(result) for result in results],
        "reference": {"name": reference.name, "num_images": len(reference.images), "key": reference.key},
        "manifold_floor": None if floor is None else dataclasses.asdict(floor),
        "pictures": list(pictures),
        "options": dataclasses.asdict(options),
        "commit": git_commit(),
        "versions": package_versions(),
        "machine": machine(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (out.parent / name).write_bytes(picture)
    write_json_atomic(out, record)
