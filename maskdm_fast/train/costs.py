"""The work of a train step, part by part: what `ops/<op>/cost.py` counts, at the shapes of a network.

Left out, as small next to a block: the time token, labels, masks, what is cut off or joined at a token's width.
Letters: K visible patches of an image, n = K + extras its tokens, D width.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from maskdm_fast.diffusion.masking import BlockMask, Grid, Mask, NoMask, PatchMask
from maskdm_fast.models import UViTConfig
from maskdm_fast.ops.adamw_ema import cost as adamw_ema
from maskdm_fast.ops.gelu import cost as gelu
from maskdm_fast.ops.lamb_ema import cost as lamb_ema
from maskdm_fast.ops.linear import cost as linear
from maskdm_fast.ops.masked_attention import cost as masked_attention
from maskdm_fast.ops.masked_dsm_loss import cost as masked_dsm_loss
from maskdm_fast.ops.noise_visible_patches import cost as noise_visible_patches
from maskdm_fast.ops.work import FLOAT, INDEX, Work
from maskdm_fast.train.stage_config import DenoisingConfig, StageConfig

NOTHING = Work()

_QUANTILES = 16
_PROBED_STEPS = 64

Counts = Sequence[tuple[int, float]]
"""Visible patches per image, as pairs (count, share of the images); the shares sum to 1."""


@dataclass(frozen=True)
class Part:
    """A kind of call that a step makes several times with the same shapes.

    Attributes:
        name: what it is for.
        op: which op or layer it is.
        calls: in a step.
        forward, backward: of one call; where blocks are computed twice, the second time belongs to backward.
        saved: bytes that the forward of one call keeps for the backward.
        per_block: calls in one block; 0: it stands outside of the blocks.
        matrix: values of the weight matrix that a call multiplies by.
    """

    name: str
    op: str
    calls: float
    forward: Work
    backward: Work = NOTHING
    saved: float = 0.0
    per_block: int = 0
    matrix: int = 0

    @property
    def work(self) -> Work:
        """Of all calls, forward and backward."""
        return (self.forward + self.backward) * self.calls


def total(parts: Iterable[Part]) -> Work:
    """Of all parts."""
    return sum((part.work for part in parts), NOTHING)


def step_parts(
    model: UViTConfig,
    counts: Counts,
    batch_size: int,
    *,
    num_micro: int,
    item: int,
    checkpointing: bool,
    weights: int,
    optimizer: Literal["adamw", "lamb"] = "adamw",
) -> list[Part]:
    """The parts of one optimizer step.

    Args:
        model: the network.
        counts: visible patches.
        batch_size: images.
        num_micro: micro-batches that they are cut into.
        item: bytes of an activation: 4, or 2 under bfloat16 autocast.
        checkpointing: compute the blocks twice.
        weights: parameters of the network.
        optimizer: which.
    """
    parts = network_parts(model, counts, batch_size / num_micro, item=item, checkpointing=checkpointing)
    if item < FLOAT:
        # Every matrix is cast once a forward pass, and its gradient back.
        cast = Work(bytes=(FLOAT + item) * sum(part.calls * part.matrix for part in parts))
        parts.append(Part("casts of weights", "casts", 1, cast, cast))
    parts = [dataclasses.replace(part, calls=part.calls * num_micro) for part in parts]
    if num_micro > 1:
        parts.append(Part("sums of micro-batches", "rest", num_micro - 1, Work(bytes=3 * FLOAT * weights)))
    update = {"adamw": adamw_ema, "lamb": lamb_ema}[optimizer].step_(weights, FLOAT)
    return [*parts, Part("optimizer, EMA", f"{optimizer}_ema", 1, adamw_ema.global_norm(weights, FLOAT) + update)]


def network_parts(
    model: UViTConfig, counts: Counts, images: float = 1, *, item: int = FLOAT, checkpointing: bool = False
) -> list[Part]:
    """Forward and backward pass of a micro-batch of `images`, from noising to the gradients; else as `step_parts`."""
    dim, hidden, blocks = model.dim, int(model.dim * model.mlp_ratio), model.num_blocks
    half, head_dim = blocks // 2, model.dim // model.num_heads
    visible = images * sum(count * share for count, share in counts)
    lengths = [(count + model.num_extras, share) for count, share in counts]
    tokens = images * sum(n * share for n, share in lengths)
    pairs = images * sum(n * n * share for n, share in lengths)
    values, stream = visible * model.token_dim, tokens * dim * item

    def product(name: str, calls: float, rows: float, fan_in: int, fan_out: int, per_block: int = 0, *,
                bias: bool = True, residual: bool = False, grad_x: bool = True) -> Part:  # fmt: skip
        forward = linear.forward(rows, fan_in, fan_out, item, bias=bias, residual=residual)
        backward = linear.backward(rows, fan_in, fan_out, item, bias=bias, grad_x=grad_x)
        return Part(name, "linear", calls, forward, backward, rows * fan_in * item, per_block, fan_in * fan_out)

    def norm(name: str, calls: float, per_block: int = 0) -> Part:
        saved = stream + 2 * tokens * FLOAT
        return Part(name, "layer_norm", calls, Work(bytes=2 * stream), Work(bytes=3 * stream), saved, per_block)

    attention = (tokens, pairs, model.num_heads, head_dim, item)
    kept = 3 * stream + tokens * model.num_heads * FLOAT  # its output is kept by the layer after
    inner = [
        norm("norms of blocks", 2 * blocks, 2),
        product("qkv", blocks, tokens, dim, 3 * dim, 1, bias=model.qkv_bias),
        Part("attention", "masked_attention", blocks, masked_attention.forward(*attention),
             masked_attention.backward(*attention), kept, 1),
        product("proj", blocks, tokens, dim, dim, 1, residual=True),
        product("fc1", blocks, tokens, dim, hidden, 1),
        Part("gelu", "gelu", blocks, gelu.forward(tokens * hidden, item), gelu.backward(tokens * hidden, item),
             tokens * hidden * item, 1),
        product("fc2", blocks, tokens, hidden, dim, 1, residual=True),
        product("long skip, stream", half, tokens, dim, dim, 1),
        product("long skip, skip", half, tokens, dim, dim, 1, bias=False, residual=True),
    ]  # fmt: skip
    if checkpointing:
        inner = [_computed_twice(part) for part in inner]
    table = model.num_extras + model.num_tokens
    outer = [
        Part("noise", "noise_visible_patches", 1, noise_visible_patches.forward(
            images, visible, model.token_dim, 1, FLOAT, all_visible=list(counts) == [(model.num_tokens, 1.0)])),
        product("patch embedding", 1, visible, model.token_dim, dim, grad_x=False),
        # Rows are picked, added and joined; their gradients go to a table of all positions.
        Part("positions", "rest", 1, Work(bytes=7 * stream), Work(bytes=3 * stream + 2 * table * dim * FLOAT),
             INDEX * visible),
        # What is used twice has two gradients: the stream at every residual, and what a long skip takes along.
        Part("sums and the rest", "rest", 2 * blocks + half, NOTHING, Work(bytes=3 * stream)),
        norm("last norm", 1),
        product("head", 1, tokens, dim, model.token_dim),
        Part("loss", "masked_dsm_loss", 1, masked_dsm_loss.forward(images, values, FLOAT, weighted=False, mean=False),
             masked_dsm_loss.backward(images, values, FLOAT, weighted=False, mean=False), 3 * values * FLOAT),
    ]  # fmt: skip
    if model.time_mlp:
        outer.append(product("time MLP, in", 1, images, dim, 4 * dim, grad_x=False))
        outer.append(product("time MLP, out", 1, images, 4 * dim, dim))
    if model.final_conv:
        pixels, flops = images * model.image_size**2, 2.0 * images * model.image_size**2 * 9 * model.channels**2
        size = pixels * model.channels * item
        outer.append(
            Part("final convolution", "convolution", 1, Work(flops, 0, 4 * size), Work(2 * flops, 0, 6 * size), size)
        )
    return inner + outer


def _computed_twice(part: Part) -> Part:
    again = dataclasses.replace(part.forward, repeated=part.forward.flops)
    return dataclasses.replace(part, backward=again + part.backward)


def saved_bytes(model: UViTConfig, num_visible: int, *, item: int = FLOAT, checkpointing: bool = False) -> float:
    """Bytes that the forward pass of one image keeps for its backward pass; arguments as `network_parts`."""
    parts = network_parts(model, [(num_visible, 1.0)], item=item)
    stream = (num_visible + model.num_extras) * model.dim * item
    outside = sum(part.calls * part.saved for part in parts if not part.per_block)
    if checkpointing:
        # An out-block's input from the long skip is the input of the in-block after it, which is kept already.
        one = sum(part.per_block * part.saved for part in parts) - stream
        return outside + model.num_blocks * stream + one
    # What comes over the long skip is kept as the input of the in-block after the one that made it.
    inside = sum(part.calls * part.saved for part in parts if part.per_block)
    return outside + inside - model.num_blocks // 2 * stream


def model_flops(model: UViTConfig, counts: Counts) -> float:
    """FLOPs of training on one image on average, nothing counted twice: what MFU is made of."""
    return total(network_parts(model, counts)).model_flops


def counts_of_mask(mask: Mask, unmasked_share: float, grid: Grid) -> Counts:
    """Visible patches under one mask, where a share of the images stays whole."""
    shares: dict[int, float] = {}
    masks = _ratios_apart(mask)
    for one in masks:
        count = one.num_visible(grid)
        shares[count] = shares.get(count, 0.0) + (1.0 - unmasked_share) / len(masks)
    if unmasked_share:
        whole = NoMask().num_visible(grid)
        shares[whole] = shares.get(whole, 0.0) + unmasked_share
    return sorted(shares.items())


def visible_counts(stage: StageConfig, grid: Grid) -> Counts:
    """Visible patches over a whole run, whose mask may move; a distillation sees whole images."""
    if not isinstance(stage, DenoisingConfig):
        return [(NoMask().num_visible(grid), 1.0)]
    steps = 1 if stage.num_images is None else -(-stage.num_images // stage.batch_size)
    probes = min(steps, _PROBED_STEPS)
    shares: dict[int, list[float]] = {}
    for probe in range(probes):
        mask = stage.mask_at((2 * probe + 1) * steps // (2 * probes))
        for count, share in counts_of_mask(mask, stage.unmasked_share, grid):
            shares.setdefault(count, []).append(share / probes)
    return sorted((count, math.fsum(found)) for count, found in shares.items())


def _ratios_apart(mask: Mask) -> list[Mask]:
    """A mask that draws a ratio per image, as masks of evenly spaced ratios."""
    if not isinstance(mask, PatchMask | BlockMask) or mask.max_ratio is None:
        return [mask]
    width = mask.max_ratio - mask.ratio
    ratios = (mask.ratio + width * (i + 0.5) / _QUANTILES for i in range(_QUANTILES))
    return [dataclasses.replace(mask, ratio=ratio, max_ratio=None) for ratio in ratios]
