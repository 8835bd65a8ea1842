"""Scores of a run while it trains."""

import os

from torch import Tensor

from maskdm_fast.data import ImageStore
from maskdm_fast.eval import FeatureNetwork, cached_features, compare, load_features, subset_indices
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.extras import require
from maskdm_fast.train.stages import Stage
from maskdm_fast.train.world import World

MAX_REFERENCE = 10_000
"""Real images that a score compares with at most: the kernel distance takes all pairs."""


class Scorer:
    """Frechet and kernel distance between samples of a stage's averaged weights and the data set.

    The noise of the samples, their classes (drawn from those of the data set) and the real images are the same at every
    score, so that a curve shows the weights and not the draws. Nothing of it touches the state of training.

    Args:
        config: of the run.
        store: its images.
        cache_dir: where the features of the real images are kept.
        world: the processes; the main one compares what all have sampled.

    Raises:
        ImportError, RuntimeError: a package of the extra ``eval`` is missing.
        FileNotFoundError, ValueError: `score_features` names no feature network.
    """

    def __init__(
        self, config: RunConfig, store: ImageStore, *, cache_dir: str | os.PathLike[str], world: World
    ) -> None:
        require("torchmetrics", "eval")
        self._output = config.output
        self._store, self._cache_dir, self._world = store, cache_dir, world
        # Everywhere, so that a wrong name is told by all of them at once.
        self._network: FeatureNetwork = load_features(self._output.score_features).to(world.device)
        self._labels: Tensor | None = None
        if config.model.num_classes:
            num = self._output.score_num_images
            rounds = -(-num // len(store))
            self._labels = store.labels[subset_indices(len(store), len(store), seed=0)].repeat(rounds)[:num]

    def __call__(self, stage: Stage) -> dict[str, float | int]:
        """The scores, by their names (``fd_lite0``, ``kid_lite0``), with their floors and the numbers of images."""
        num_images = self._output.score_num_images
        samples = stage.preview(num_images, labels=self._labels, num_steps=self._output.score_steps)
        return self._world.on_main(lambda: self._compare(samples))

    def _compare(self, samples: Tensor) -> dict[str, float | int]:
        scores = compare(samples, self._reference(), self._network, seed=0)  # one floor for all stages of a recipe
        fd, kid = (name.lower().replace("-", "_") for name in (scores.fd_name, scores.kid_name))
        return {
            fd: scores.fd,
            f"{fd}_floor": scores.fd_floor,
            kid: scores.kid,
            f"{kid}_floor": scores.kid_floor,
            "num_generated": scores.num_generated,
            "num_reference": scores.num_reference,
        }

    def _reference(self) -> Tensor:
        """Features of the real images; read from the cache but the first time."""
        images, key = self._store.images, self._store.header.checksum
        if len(images) > MAX_REFERENCE:
            chosen = subset_indices(len(images), MAX_REFERENCE, seed=0).sort().values
            images, key = self._store.batch(chosen)[0], f"{key}|subset"
        return cached_features(images, self._network, key=key, cache_dir=self._cache_dir)
