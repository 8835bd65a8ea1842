"""How distillation asks its networks: the passes of every update, from which arithmetic and memory are counted."""

from dataclasses import dataclass
from typing import Literal

from maskdm_fast.distill.dmd2 import DMD2
from maskdm_fast.distill.generator import Generator
from maskdm_fast.distill.method import Method
from maskdm_fast.distill.sida import SiDA

Gradients = Literal["none", "inputs", "weights", "both"]
BACKWARD: dict[Gradients, float] = {"none": 0.0, "inputs": 1.0, "weights": 2.0, "both": 2.0}
"""A backward pass by what it has gradients for, in forward passes: exact for a product of two matrices, but for that of
the first layer, whose input needs none under ``weights``. Attention has no weights: its backward pass is 2 always."""
ENCODER = 0.5
"""The part of a network that a discriminator runs."""


@dataclass(frozen=True)
class Pass:
    """Evaluations of a network in an update, and how far back the gradients go from there.

    Attributes:
        network: which.
        gradients: of its weights, of its input (the weights are frozen), of both, or none (nothing is kept).
        images: evaluations for each image of the batch, on average.
        calls: of the network, in which they are made one after the other.
        tap: as of `models.UViT`.
        head: whether a `CriticHead` judges what comes from the tap.
    """

    network: str
    gradients: Gradients
    images: float = 1.0
    calls: float = 1.0
    tap: Literal["encoder", "both"] | None = None
    head: bool = False

    @property
    def evaluations(self) -> float:
        """In units of a forward pass of the network on an image."""
        return self.images * (ENCODER if self.tap == "encoder" else 1.0) * (1.0 + BACKWARD[self.gradients])


@dataclass(frozen=True)
class Evaluations:
    """Of one image, in units of a forward pass; a backward pass is 2, one that reaches inputs only is 1.

    Attributes:
        fake: in an update of the fake network.
        generator: in one of the generator.
    """

    fake: float
    generator: float


def evaluations(method: Method, generator: Generator) -> Evaluations:
    """What the updates of `method` cost, once its discriminator, if it has one, counts.

        SiD:   4 = generator 1, fake 3;                 7 = generator 3, teacher 2, fake 2
        SiDA:  5.5, with the encoder on real images;    7, the logits are those of the same call
        DMD2:  4;                                       5 = generator 3, teacher 1, fake 1
               7, with the encoder on both images;      6, with an encoder and its backward pass to the input

    for a generator of one step. Guidance by a scale other than 0 and 1 asks a network twice.
    """
    passes = fake_passes, generator_passes
    fake, trained = (
        sum(one.evaluations for one in of(method, generator.num_steps, generator.trained_steps)) for of in passes
    )
    return Evaluations(fake, trained)


def fake_passes(method: Method, num_steps: int, trained_steps: str) -> tuple[Pass, ...]:
    """Of `Method.fake_loss`.

    Args:
        method: which.
        num_steps, trained_steps: of the `Generator`.
    """
    made = (num_steps + 1) / 2 if trained_steps == "one" else num_steps
    asked = _asked(method.guidance.fake_training)
    generated = Pass("generator", "none", made, made)
    if isinstance(method, SiDA):
        # Real images see the encoder alone; so do generated ones where guidance leaves no call to tap.
        shared = Pass("fake", "weights", tap="both")
        guided = (Pass("fake", "weights", asked), Pass("fake", "weights", tap="encoder"))
        return generated, *([shared] if asked == 1.0 else guided), Pass("fake", "weights", tap="encoder")
    estimate = Pass("fake", "weights", asked)
    if method.needs_images:
        return generated, estimate, Pass("fake", "weights", 2.0, tap="encoder", head=True)
    return generated, estimate


def generator_passes(method: Method, num_steps: int, trained_steps: str) -> tuple[Pass, ...]:
    """Of `Method.generator_loss`; arguments as of `fake_passes`."""
    if trained_steps == "one":
        before = (num_steps - 1) / 2
        more = Pass("generator", "none", before, before)
    else:
        more = Pass("generator", "both", num_steps - 1, num_steps - 1)
    generated = [Pass("generator", "weights"), *([more] if more.images else [])]
    of_teacher, of_fake = _asked(method.guidance.teacher), _asked(method.guidance.fake)
    if isinstance(method, DMD2):
        judged = [Pass("fake", "inputs", tap="encoder", head=True)] if method.needs_images else []
        return *generated, Pass("teacher", "none", of_teacher), Pass("fake", "none", of_fake), *judged
    teacher = Pass("teacher", "inputs", of_teacher)
    if not isinstance(method, SiDA):
        return *generated, teacher, Pass("fake", "inputs", of_fake)
    if of_fake == 1.0:
        return *generated, teacher, Pass("fake", "inputs", tap="both")
    return *generated, teacher, Pass("fake", "inputs", of_fake), Pass("fake", "inputs", tap="encoder")


def _asked(scale: float) -> float:
    """Evaluations of a network whose estimate is guided by `scale`."""
    return 1.0 if scale in (0.0, 1.0) else 2.0
