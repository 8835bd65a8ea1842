"""The work of a train step, part by part: what `ops/<op>/cost.py` counts, at the shapes of a network.

Left out, as small next to a block: the time token, labels, masks, what is cut off or joined at a token's width.
Letters: K visible patches of an image, n = K + extras its tokens, D width.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maskdm_fast.diffusion.masking import BlockMask, Grid, Mask, NoMask, PatchMask
from maskdm_fast.distill.costs import Pass
from maskdm_fast.models import UViTConfig
from maskdm_fast.ops.gelu import cost as gelu
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


def network_parts(
    model: UViTConfig, counts: Counts, images: float = 1, *, item: int = FLOAT, checkpointing: bool = False
) -> list[Part]:
    """Forward and backward pass of a micro-batch in denoising, from noising to the gradients.

    Args:
        model: the network.
        counts: visible patches.
        images: of the micro-batch.
        item: bytes of an activation: 4, or 2 under bfloat16 autocast.
        checkpointing: compute the blocks twice.
    """
    asked = Pass("network", "weights")
    return [
        *pass_parts(model, counts, images, asked, item=item, checkpointing=checkpointing),
        *denoising_parts(model, counts, images),
    ]


def denoising_parts(model: UViTConfig, counts: Counts, images: float) -> list[Part]:
    """Of a micro-batch in denoising, what stands before and after the network; arguments as `network_parts`."""
    visible = images * sum(count * share for count, share in counts)
    values, whole = visible * model.token_dim, list(counts) == [(model.num_tokens, 1.0)]
    noise = noise_visible_patches.forward(images, visible, model.token_dim, 1, FLOAT, all_visible=whole)
    forward = masked_dsm_loss.forward(images, values, FLOAT, weighted=False, mean=False)
    backward = masked_dsm_loss.backward(images, values, FLOAT, weighted=False, mean=False)
    return [
        Part("noise", "noise_visible_patches", 1, noise),
        Part("loss", "masked_dsm_loss", 1, forward, backward, 3 * values * FLOAT),
    ]


def pass_parts(
    model: UViTConfig,
    counts: Counts,
    images: float,
    asked: Pass,
    *,
    item: int = FLOAT,
    checkpointing: bool = False,
) -> list[Part]:
    """Of the evaluations of a network alone, and the gradients that they are asked for, in a micro-batch of `images`;
    the other arguments are those of `network_parts`. A frozen weight has no gradient, and the input of its layer is not
    kept."""
    images = images * asked.images / asked.calls
    trained, to_input = asked.gradients in ("weights", "both"), asked.gradients in ("inputs", "both")
    dim, hidden = model.dim, int(model.dim * model.mlp_ratio)
    half, head_dim = model.num_blocks // 2, model.dim // model.num_heads
    whole = asked.tap != "encoder"
    blocks = model.num_blocks if whole else half + 1
    visible = images * sum(count * share for count, share in counts)
    lengths = [(count + model.num_extras, share) for count, share in counts]
    tokens = images * sum(n * share for n, share in lengths)
    pairs = images * sum(n * n * share for n, share in lengths)
    stream = tokens * dim * item

    def product(name: str, calls: float, rows: float, fan_in: int, fan_out: int, per_block: int = 0, *,
                bias: bool = True, residual: bool = False, grad_x: bool = True) -> Part:  # fmt: skip
        forward = linear.forward(rows, fan_in, fan_out, item, bias=bias, residual=residual)
        backward = linear.backward(rows, fan_in, fan_out, item, bias=bias, grad_x=grad_x, grad_weight=trained)
        saved = rows * fan_in * item if trained else 0.0
        return Part(name, "linear", calls, forward, backward, saved, per_block, fan_in * fan_out)

    def norm(name: str, calls: float, per_block: int = 0, rows: float = tokens) -> Part:
        size = rows * dim * item
        return Part(
            name, "layer_norm", calls, Work(bytes=2 * size), Work(bytes=3 * size), size + 2 * rows * FLOAT, per_block
        )

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
    ]  # fmt: skip
    if whole:
        inner += [
            product("long skip, stream", half, tokens, dim, dim, 1),
            product("long skip, skip", half, tokens, dim, dim, 1, bias=False, residual=True),
        ]
    if checkpointing:
        inner = [_computed_twice(part) for part in inner]
    table = model.num_extras + model.num_tokens
    outer = [
        product("patch embedding", 1, visible, model.token_dim, dim, grad_x=to_input),
        # Rows are picked, added and joined; their gradients go to a table of all positions.
        Part("positions", "rest", 1, Work(bytes=7 * stream),
             Work(bytes=3 * stream + 2 * table * dim * FLOAT) if trained else NOTHING, INDEX * visible),
        # What is used twice has two gradients: the stream at every residual, and what a long skip takes along.
        Part("sums and the rest", "rest", 2 * blocks + (half if whole else 0), NOTHING, Work(bytes=3 * stream)),
    ]  # fmt: skip
    if whole:
        outer += [norm("last norm", 1), product("head", 1, tokens, dim, model.token_dim)]
    if asked.head:
        outer += [
            norm("norm of the critic", 1, rows=visible),
            product("critic, in", 1, visible, dim, dim),
            Part("critic, SiLU", "rest", 1, Work(bytes=2 * visible * dim * item), Work(bytes=3 * visible * dim * item),
                 visible * dim * item),
            product("critic, out", 1, visible, dim, 1),
        ]  # fmt: skip
    if model.time_mlp:
        # No time has a gradient.
        inputs = product("time MLP, in", 1, images, dim, 4 * dim, grad_x=False)
        outer += [
            part if trained else dataclasses.replace(part, backward=NOTHING)
            for part in (inputs, product("time MLP, out", 1, images, 4 * dim, dim))
        ]
    if model.final_conv and whole:
        pixels, flops = images * model.image_size**2, 2.0 * images * model.image_size**2 * 9 * model.channels**2
        size = pixels * model.channels * item
        back = Work((1 + trained) * flops, 0, (4 + 2 * trained) * size)
        outer.append(
            Part("final convolution", "convolution", 1, Work(flops, 0, 4 * size), back, size if trained else 0)
        )
    parts = [dataclasses.replace(part, calls=part.calls * asked.calls) for part in inner + outer]
    if asked.gradients == "none":
        return [dataclasses.replace(part, backward=NOTHING, saved=0.0) for part in parts]
    return parts


def _computed_twice(part: Part) -> Part:
    again = dataclasses.replace(part.forward, repeated=part.forward.flops)
    return dataclasses.replace(part, backward=again + part.backward)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for its backward pass.

    Attributes:
        kept: from the forward pass on.
        again: of the block that the backward pass is computing again, where blocks are checkpointed.
    """

    kept: float
    again: float = 0.0


def saved_by(
    model: UViTConfig, num_visible: int, asked: Pass, *, item: int = FLOAT, checkpointing: bool = False
) -> Saved:
    """What `asked` keeps for each image of the batch, all evaluations of it together; arguments as `pass_parts`."""
    if asked.gradients == "none":
        return Saved(0.0)
    parts = pass_parts(model, [(num_visible, 1.0)], 1, asked, item=item)
    stream = asked.images / asked.calls * (num_visible + model.num_extras) * model.dim * item
    blocks = model.num_blocks // 2 + 1 if asked.tap == "encoder" else model.num_blocks
    outside = sum(part.calls * part.saved for part in parts if not part.per_block)
    # What comes over the long skip is the input of the in-block after the one that made it, which is kept already.
    shared = stream if asked.tap != "encoder" and asked.gradients != "inputs" else 0.0
    if checkpointing:
        # Both inputs of a block with a long skip are there already.
        one = sum(part.per_block * part.saved for part in parts) - 2 * shared
        return Saved(outside + asked.calls * blocks * stream, one)
    inside = sum(part.calls * part.saved for part in parts if part.per_block)
    return Saved(outside + inside - asked.calls * (model.num_blocks // 2) * shared)


def saved_bytes(model: UViTConfig, num_visible: int, *, item: int = FLOAT, checkpointing: bool = False) -> float:
    """Bytes that denoising one image keeps for its backward pass; arguments as `network_parts`."""
    found = saved_by(model, num_visible, Pass("network", "weights"), item=item, checkpointing=checkpointing)
    return found.kept + found.again + 3 * num_visible * model.token_dim * FLOAT


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
