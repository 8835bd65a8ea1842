"""What the trainer expects of a stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.metrics import Values
from maskdm_fast.train.pieces import Pieces, Reader
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World

PREVIEW_STEPS = 25
"""Sampler steps of a preview, unless it is asked for more."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device.

    Attributes:
        images: uint8 ``[B, h, w, C]``, or float16 x0 of latents.
        labels: int64 ``[B]``, -1 where an image has no class.
        slots: int64 ``[B]``, places in the global batch; every random draw for image i uses ``slots[i]``.
    """

    images: Tensor
    labels: Tensor
    slots: Tensor


class Stage(Protocol):
    """Networks, losses and updates of one kind of training.

    A stage keeps no state that `state_dict` leaves out: with the step number and the batches, its state decides the
    next one.
    """

    @classmethod
    def build(cls, config: RunConfig, world: World, weights: Weights | None, teacher: Weights | None = None) -> "Stage":
        """Make networks and engines.

        Args:
            config: of the run.
            world: the processes that train.
            weights: what to begin with (optimizer and moving average start fresh); None: a student begins at its
                teacher's weights, another network at draws of the run's seed.
            teacher: what is distilled; None unless the stage distils.

        Raises:
            ValueError: `weights` do not fit; the message names the tensors.
        """
        ...

    def step(self, batches: Sequence[Batch], step: int) -> Values:
        """One optimizer step on this process's part of the global batch, in micro-batches.

        Args:
            batches: the micro-batches.
            step: optimizer steps done before this one.

        Returns:
            What to log, to be averaged over steps and processes as `Meter` does: at least ``loss`` and ``grad_norm``;
            ``skipped`` is 1 where a loss scale made the step void. Nothing here waits for the device.
        """
        ...

    def lr(self, step: int) -> float:
        """Learning rate used by the step that follows `step` finished ones."""
        ...

    def flops_per_image(self, step: int) -> float:
        """Model FLOPs of training on one image, on average, in the step that follows `step` finished ones: matrix
        products and convolutions of forward and backward pass, nothing counted twice."""
        ...

    def tokens_per_image(self, step: int) -> float:
        """Tokens of one image that go through the network, on average, in the step that follows `step` finished ones:
        visible patches and extras."""
        ...

    def preview(self, num_images: int, *, labels: Tensor | None = None, num_steps: int = PREVIEW_STEPS) -> Tensor:
        """Sample from the averaged weights, always with the same noise. All processes must ask; each samples a share.

        Args:
            num_images: how many.
            labels: int64 ``[num_images]``, classes for a class-conditional network; None: all classes in turn.
            num_steps: of the sampler.

        Returns:
            uint8 ``[num_images, h, w, C]`` on the CPU.
        """
        ...

    def pieces(self) -> Pieces:
        """What this process has of the state, as `Engine.pieces`; the groups ``model`` and ``ema`` make complete state
        dicts of the network to be sampled."""
        ...

    def load(self, reader: Reader) -> None:
        """Continue from the pieces of any number of processes."""
        ...

    def close(self) -> None:
        """Give back what its engines hold; the stage cannot be used afterwards."""
        ...
