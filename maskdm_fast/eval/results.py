"""What an experiment hands to its report: plain data, no drawing."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from maskdm_fast.eval.distances import Scores
from maskdm_fast.eval.features import Images
from maskdm_fast.eval.neighbours import Neighbours


@dataclasses.dataclass(frozen=True)
class StageResult:
    """One stage of a run.

    Attributes:
        name: such as "pretrain".
        description: what sets the stage apart, in a few words.
        points: (images, seconds, loss), images and seconds counted from the start of the run, not of the stage.
        images: images trained on in this stage.
        seconds: training time of this stage.
        path: where its weights are.
    """

    name: str
    description: str
    points: Sequence[tuple[float, float, float]]
    images: int
    seconds: float
    path: str = ""

    @property
    def images_per_s(self) -> float:
        """Images per second of training time, 0 where no time was spent."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class NeighbourStrip:
    """Some samples and their nearest training images.

    Attributes:
        samples: uint8 ``[n, h, w, C]``.
        neighbours: uint8 ``[n, k, h, w, C]``, nearest first.
        distances: ``[n, k]``.
        measure: name of the distance.
    """

    samples: np.ndarray
    neighbours: np.ndarray
    distances: np.ndarray
    measure: str

    @classmethod
    def of(cls, samples: Images, reference: Images, found: Neighbours, measure: str) -> "NeighbourStrip":
        """Collect the images that `nearest` found; `samples` ``[n, h, w, C]`` and `reference` ``[m, h, w, C]``."""
        return cls(np.asarray(samples), np.asarray(reference)[found.indices.numpy()], found.distances.numpy(), measure)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One of the runs that are compared.

    Attributes:
        name: short, unique in the report.
        description: one sentence.
        stages: in the order they ran.
        samples: uint8 ``[n, h, w, C]`` to show.
        samples_caption: which samples these are and how they were drawn.
        scores: None where nothing was scored.
        neighbours: None where not looked for.
    """

    name: str
    description: str
    stages: Sequence[StageResult]
    samples: Images
    samples_caption: str = ""
    scores: Scores | None = None
    neighbours: NeighbourStrip | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    Attributes:
        title: heading.
        lead: what was done, one paragraph.
        runs: at least one.
        real: uint8 ``[n, h, w, C]`` training images to show beside the samples, or None.
        real_caption: which images these are.
        facts: how it was run: data, seed, machine, versions, commit, command.
        paths: what was saved: name -> path.
        attribution: credit for the images shown, or "".
        verdict: what came out; "" writes it from the scores (`summary.verdict`).
    """

    title: str
    lead: str
    runs: Sequence[RunResult]
    real: Images | None = None
    real_caption: str = ""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attribution: str = ""
    verdict: str = ""
