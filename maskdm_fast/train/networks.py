"""The networks of a run, as far as memory and arithmetic depend on them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from maskdm_fast.distill.costs import Gradients, Pass
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.ops.work import FLOAT
from maskdm_fast.train.costs import Counts, Part, Saved, pass_parts, saved_by
from maskdm_fast.train.measured import Measured, measured
from maskdm_fast.train.policy_config import PolicyDistillationConfig

Wrap = Callable[[UViT], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network of a run.

    Attributes:
        name: what it is in the run.
        model: its shape.
        wrap: what stands around it, if anything does.
        trained: whether it has an engine; else it is frozen.
        moments: values of its optimizer for each of its own.
        average: whether there is a moving average of it.
        value_of: the stage whose value it is; it is no U-ViT then, and has images of the shape of `model` as its input.
    """

    name: str
    model: UViTConfig
    wrap: Wrap | None = None
    trained: bool = True
    moments: int = 2
    average: bool = True
    value_of: PolicyDistillationConfig | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each of its parameters."""
        return _sizes(self.model, self.wrap) if self.value_of is None else _value_sizes(self.value_of, self.model)

    @property
    def values(self) -> int:
        """Its parameters."""
        return sum(self.sizes)

    def item(self, item: int) -> int:
        """Bytes of an activation of it, in a run where they are `item`."""
        return FLOAT if self.value_of is not None and self.value_of.value_precision == "fp32" else item

    def parts(self, counts: Counts, images: float, asked: Pass, *, item: int, checkpointing: bool) -> list[Part]:
        """As `costs.pass_parts`."""
        if self.value_of is None:
            return pass_parts(self.model, counts, images, asked, item=item, checkpointing=checkpointing)
        found = self._measured(images, asked, item)
        op = {"resnet": "convolution", "vit": "linear"}[self.value_of.value]
        return [Part("value", op, asked.calls, found.forward, found.backward, found.saved)]

    def saved(self, count: int, images: int, asked: Pass, *, item: int, checkpointing: bool) -> Saved:
        """As `costs.saved_by`, of so many images."""
        if self.value_of is None:
            found = saved_by(self.model, count, asked, item=item, checkpointing=checkpointing)
            return Saved(images * found.kept, images * found.again)
        return Saved(asked.calls * self._measured(images, asked, item).saved)

    def _measured(self, images: float, asked: Pass, item: int) -> Measured:
        images = max(1, round(images * asked.images / asked.calls))
        return _measured_value(self.value_of, self.model, images, asked.gradients, self.item(item))


@functools.lru_cache(maxsize=64)
def _sizes(model: UViTConfig, wrap: Wrap | None) -> tuple[int, ...]:
    with torch.device("meta"):
        network = UViT(model)
        whole = network if wrap is None else wrap(network)
    return tuple(parameter.numel() for parameter in whole.parameters())


@functools.lru_cache(maxsize=16)
def _value_sizes(stage: PolicyDistillationConfig, model: UViTConfig) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in stage.make_value(model, seed=0).parameters())


@functools.lru_cache(maxsize=64)
def _measured_value(
    stage: PolicyDistillationConfig, model: UViTConfig, images: int, gradients: Gradients, item: int
) -> Measured:
    value = stage.make_value(model, seed=0)
    flops = images * value.flops
    value = value.to("meta", torch.float32 if item == FLOAT else torch.bfloat16)
    with torch.device("meta"):
        inputs = torch.empty(images, model.num_tokens, model.token_dim), torch.empty(images, dtype=torch.int64)
    return measured(value, flops, gradients, *inputs)
