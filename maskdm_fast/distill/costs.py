"""How many evaluations of a network the updates of score distillation take."""

from dataclasses import dataclass

from maskdm_fast.distill.dmd2 import DMD2
from maskdm_fast.distill.generator import Generator
from maskdm_fast.distill.method import Method
from maskdm_fast.distill.sida import SiDA

_ENCODER = 0.5
"""The part of a network that a discriminator runs."""


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
    calls = generator.num_steps
    made = (calls + 1) / 2 if generator.trained_steps == "one" else float(calls)
    trained = made + 2.0 if generator.trained_steps == "one" else 3.0 * calls
    guidance = method.guidance
    teacher, fake, fake_training = (
        1.0 if scale in (0.0, 1.0) else 2.0 for scale in (guidance.teacher, guidance.fake, guidance.fake_training)
    )
    of_fake = made + 3.0 * fake_training
    if isinstance(method, DMD2):
        critic = method.needs_images
        return Evaluations(of_fake + 6 * _ENCODER * critic, trained + teacher + fake + 2 * _ENCODER * critic)
    if isinstance(method, SiDA):
        of_fake += 3 * _ENCODER
    return Evaluations(of_fake, trained + 2.0 * teacher + 2.0 * fake)
