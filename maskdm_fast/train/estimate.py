"""What a run will cost, before it begins: tokens, arithmetic, memory traffic, memory and time.

The network is counted op by op (see `Cost`); time is arithmetic over this machine's matrix product rate plus traffic
over its copy bandwidth, both measured for a fraction of a second. It is an estimate: nothing overlaps, no launch costs
anything, and what is small next to a block (time token, masks, data loading) is left out.

Letters: K visible patches of an image, n = K + extras its tokens, D width.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdm_fast import ops
from maskdm_fast.diffusion.masking import BlockMask, Mask, NoMask, PatchMask
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.train.config import DenoisingConfig, Recipe, RunConfig, flatten
from maskdm_fast.train.engine import make_world
from maskdm_fast.train.progress import format_seconds

_QUANTILES = 16
_PROBED_STEPS = 64
_FLOAT = 4  # bytes of float32, in which weights, optimizer state and statistics are kept
_STATE_PASSES = 13
"""Times that a step passes over all parameters: forward and backward read them and write the gradient; the norm reads
it; the optimizer reads weight, gradient, two moments and average, and writes all of them but the gradient."""


@dataclass(frozen=True)
class Cost:
    """Of one image, or of part of a network on it.

    Attributes:
        forward, backward: floating point operations of matrix products and convolutions, a multiply-add being two.
        traffic: bytes that forward and backward read and write if no two ops share a pass, without weights.
        saved: bytes that the forward keeps for the backward.
    """

    forward: float = 0.0
    backward: float = 0.0
    traffic: float = 0.0
    saved: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Cost":
        return Cost(*(value * factor for value in dataclasses.astuple(self)))

    @property
    def flops(self) -> float:
        """Of forward and backward."""
        return self.forward + self.backward


def image_cost(model: UViTConfig, num_visible: int, *, item: int = _FLOAT, checkpointing: bool = False) -> Cost:
    """Cost of training on one image.

    Args:
        model: the network.
        num_visible: K.
        item: bytes of an activation: 4, or 2 under bfloat16 autocast.
        checkpointing: keep only the inputs of the blocks, and compute blocks twice.
    """
    n, dim, values = num_visible + model.num_extras, model.dim, num_visible * model.token_dim
    # Noise: a byte in, a noisy value and its target out. Loss: two values and their gradient, kept as float32.
    data = Cost(traffic=values * (1 + 2 * _FLOAT) + 3 * values * _FLOAT, saved=3 * values * _FLOAT)
    embed = _linear(num_visible, model.token_dim, dim, item, grad_x=False)
    positions = Cost(traffic=10 * n * dim * item, saved=8 * num_visible)  # row picked, added, joined; and back
    head = _norm(n, dim, item) + _linear(n, dim, model.token_dim, item)
    half = model.num_blocks // 2
    if checkpointing:
        # An out-block's input from the long skip is the input of the in-block after it, which is kept already.
        inner = _block(model, n, item, skip=True)
        again = inner * half + _block(model, n, item, skip=False) * (half + 1)
        blocks = Cost(
            again.forward,
            again.forward + again.backward,
            4 / 3 * again.traffic,
            model.num_blocks * n * dim * item + inner.saved,
        )
    else:
        blocks = _block(model, n, item, skip=True) * half + _block(model, n, item, skip=False) * (half + 1)
    total = data + embed + positions + blocks + head
    if model.time_mlp:
        total += _linear(1, dim, 4 * dim, item, grad_x=False) + _linear(1, 4 * dim, dim, item)
    if model.final_conv:
        pixels = model.image_size**2
        macs = pixels * 9 * model.channels**2
        total += Cost(2 * macs, 4 * macs, 10 * pixels * model.channels * item, pixels * model.channels * item)
    return total


def _block(model: UViTConfig, n: int, item: int, *, skip: bool) -> Cost:
    dim, hidden = model.dim, int(model.dim * model.mlp_ratio)
    total = _norm(n, dim, item) * 2
    total += _linear(n, dim, 3 * dim, item) + _attention(n, dim, model.num_heads, item) + _linear(n, dim, dim, item)
    total += _linear(n, dim, hidden, item) + _gelu(n, hidden, item) + _linear(n, hidden, dim, item)
    total += Cost(traffic=2 * 6 * n * dim * item)  # two residual sums, and the sums of their gradients
    if skip:
        # What comes over the long skip is kept as the input of the in-block after the one that made it.
        total += _linear(n, dim, dim, item) * 2 + Cost(saved=-n * dim * item)
    return total


def _linear(n: int, width_in: int, width_out: int, item: int, *, grad_x: bool = True) -> Cost:
    x, y, product = n * width_in, n * width_out, 2 * n * width_in * width_out
    traffic = (x + y) + (x + y) + (x + y if grad_x else 0)  # forward, gradient of the weight, gradient of x
    return Cost(product, product * (1 + grad_x), traffic * item, x * item)


def _norm(n: int, dim: int, item: int) -> Cost:
    return Cost(traffic=5 * n * dim * item, saved=n * dim * item + 2 * n * _FLOAT)


def _gelu(n: int, hidden: int, item: int) -> Cost:
    return Cost(traffic=5 * n * hidden * item, saved=n * hidden * item)


def _attention(n: int, dim: int, num_heads: int, item: int) -> Cost:
    """Scores never reach memory: the op keeps q, k, v and one number per row; its output is kept by the layer after."""
    products = 2 * 2 * n * n * dim
    return Cost(products, 2 * products, (4 + 8) * n * dim * item, 3 * n * dim * item + n * num_heads * _FLOAT)


@dataclass(frozen=True)
class Rates:
    """What a machine does.

    Attributes:
        flops: of a matrix product, per second.
        bytes: read and written by a copy, per second.
    """

    flops: float
    bytes: float


def measure_rates(model: UViTConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure a product of the network's MLP with this many rows, and a copy of 64 MiB; takes about a second."""
    rows = max(64, min(tokens, 4096))
    x = torch.full((rows, model.dim), 0.5, dtype=dtype, device=device)
    weight = torch.full((4 * model.dim, model.dim), 0.5, dtype=dtype, device=device)
    source = torch.zeros(1 << 24, device=device)
    target = torch.zeros_like(source)
    product = _seconds(lambda: ops.linear(x, weight))
    copy = _seconds(lambda: target.copy_(source))
    return Rates(2 * x.numel() * 4 * model.dim / product, 2 * source.nbytes / copy)


def _seconds(work: Callable[[], Tensor], budget: float = 0.3) -> float:
    """Median time of one call over ten groups that together take about `budget` seconds; reading a value waits."""
    work().flatten()[0].item()
    start = time.perf_counter()
    work().flatten()[0].item()
    repeats = max(1, int(budget / 10 / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            out = work()
        out.flatten()[0].item()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


@dataclass(frozen=True)
class Estimate:
    """Of one run.

    Attributes:
        parameters: of the network.
        extras, visible, patches: tokens of an image that are no patches, mean visible patches, all patches.
        masked, dense: cost of an image as it is trained, and of the same image unmasked.
        memory: bytes by what they are for.
        step_seconds: of one optimizer step.
        images_per_s: images per second.
        steps: optimizer steps of the whole run; None if only time ends it.
        seconds: of the whole run.
        limited: whether ``max_seconds`` ends it first.
    """

    parameters: int
    extras: int
    visible: float
    patches: int
    masked: Cost
    dense: Cost
    memory: dict[str, float]
    step_seconds: float
    images_per_s: float
    steps: int | None
    seconds: float
    limited: bool


def estimate(config: RunConfig, rates: Rates) -> Estimate:
    """What the run of `config` costs on a machine with these rates. Reads no data: a class-conditional run whose number
    of classes is not known yet is counted with one."""
    model, stage, machine = config.model, config.stage, config.machine
    if config.class_conditional and not model.num_classes:
        model = dataclasses.replace(model, num_classes=1)
    side = model.image_size // model.patch_size
    item = 2 if config.precision == "bf16" else _FLOAT
    options = {"item": item, "checkpointing": machine.activation_checkpointing}
    counts = visible_counts(stage, (side, side))
    masked = sum((image_cost(model, count, **options) * share for count, share in counts), Cost())
    dense = image_cost(model, model.num_tokens, **options)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in UViT(model).parameters())
    micro = min(machine.micro_batch_size or stage.batch_size, stage.batch_size)
    largest = max(image_cost(model, count, **options).saved for count, _ in counts)
    memory = {
        "weights": parameters * _FLOAT,
        "gradients": parameters * _FLOAT,
        "optimizer and average": 3 * parameters * _FLOAT,
        "activations": micro * largest,
    }
    if config.precision == "bf16":
        memory["weights as bfloat16"] = parameters * item
    traffic = masked.traffic * stage.batch_size + _STATE_PASSES * parameters * _FLOAT
    step_seconds = masked.flops * stage.batch_size / rates.flops + traffic / rates.bytes
    steps = None if stage.num_images is None else -(-stage.num_images // stage.batch_size)
    whole = float("inf") if steps is None else steps * step_seconds
    limit = float("inf") if stage.max_seconds is None else stage.max_seconds
    return Estimate(
        parameters=parameters,
        extras=model.num_extras,
        visible=sum(count * share for count, share in counts),
        patches=model.num_tokens,
        masked=masked,
        dense=dense,
        memory=memory,
        step_seconds=step_seconds,
        images_per_s=stage.batch_size / step_seconds,
        steps=steps,
        seconds=min(whole, limit),
        limited=limit < whole,
    )


def visible_counts(stage: DenoisingConfig, grid: tuple[int, int]) -> list[tuple[int, float]]:
    """Visible patches per image over a whole run, as pairs (count, share of the images); the shares sum to 1."""
    steps = 1 if stage.num_images is None else -(-stage.num_images // stage.batch_size)
    probes = min(steps, _PROBED_STEPS)
    shares: dict[int, float] = {}
    for probe in range(probes):
        masks = _ratios_apart(stage.mask_at((2 * probe + 1) * steps // (2 * probes)))
        for mask in masks:
            count = mask.num_visible(grid)
            shares[count] = shares.get(count, 0.0) + (1.0 - stage.unmasked_share) / (probes * len(masks))
    if stage.unmasked_share:
        whole = NoMask().num_visible(grid)
        shares[whole] = shares.get(whole, 0.0) + stage.unmasked_share
    return sorted(shares.items())


def _ratios_apart(mask: Mask) -> list[Mask]:
    """A mask that draws a ratio per image, as masks of evenly spaced ratios."""
    if not isinstance(mask, PatchMask | BlockMask) or mask.max_ratio is None:
        return [mask]
    width = mask.max_ratio - mask.ratio
    ratios = (mask.ratio + width * (i + 0.5) / _QUANTILES for i in range(_QUANTILES))
    return [dataclasses.replace(mask, ratio=ratio, max_ratio=None) for ratio in ratios]


def describe(config: RunConfig | Recipe) -> str:
    """The resolved configuration and the estimate of every run, as text; measures this machine."""
    runs = config.runs() if isinstance(config, Recipe) else [("", config)]
    shared, lines = None, []
    for name, run in runs:
        values = flatten(run.to_dict())
        stage = {key: values.pop(key) for key in list(values) if key.startswith("stage.") or key == "seed"}
        if shared is None:
            shared = values
            lines += ["configuration", *_table(shared), ""]
        lines += [name or "run", *_table({key.removeprefix("stage."): value for key, value in stage.items()})]
        lines += ["", *_table(_in_words(run)), ""]
    return "\n".join(lines).rstrip()


def _in_words(config: RunConfig) -> dict[str, str]:
    device = make_world(config.machine.device).device
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    side = config.model.image_size // config.model.patch_size
    micro = min(config.machine.micro_batch_size or config.stage.batch_size, config.stage.batch_size)
    mean = sum(count * share for count, share in visible_counts(config.stage, (side, side)))
    rates = measure_rates(config.model, round(micro * mean), dtype, device)
    found = estimate(config, rates)
    memory = ", ".join(f"{name} {_amount(value)}B" for name, value in found.memory.items())
    end = "; max_seconds ends it" if found.limited else ""
    length = "until max_seconds" if found.steps is None else f"{found.steps:,} steps"
    classes = config.class_conditional and not config.model.num_classes
    gain = {
        "unmasked": f"{_amount(found.dense.flops)}FLOPs, {_amount(found.dense.traffic)}B per image",
        "masking gain": f"{found.dense.flops / found.masked.flops:.2f} x fewer FLOPs, "
        f"{found.dense.traffic / found.masked.traffic:.2f} x fewer bytes",
    }
    return {
        "parameters": f"{found.parameters:,}"
        + (f" with one class, and {config.model.dim} more for each class of the data set" if classes else ""),
        "tokens per image": f"{found.visible:.4g} of {found.patches} patches visible, and {found.extras} more",
        "work per image": f"{_amount(found.masked.flops)}FLOPs, {_amount(found.masked.traffic)}B read and written",
        **(gain if found.visible < found.patches else {}),
        "memory": f"{_amount(sum(found.memory.values()))}B: {memory}",
        "machine": f"{device}: {_amount(rates.flops)}FLOP/s, {_amount(rates.bytes)}B/s measured now",
        "time, an estimate": f"{found.step_seconds:.3g} s per step, {found.images_per_s:,.4g} images/s, "
        f"{format_seconds(found.seconds)} in all ({length}{end})",
    }


def _table(values: dict[str, object]) -> list[str]:
    width = max(map(len, values)) + 2
    return [f"  {key:<{width}}{value}" for key, value in values.items()]


def _amount(value: float) -> str:
    """Three digits and a decimal prefix: 3.41 G."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
