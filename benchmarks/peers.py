"""Every op beside the best plain PyTorch for the same job, on the same inputs.

Where PyTorch offers several ways, all are listed and the fastest counts.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.optimizer_peers import adamw_ema, lamb_ema
from benchmarks.tasks import HERE, Outputs, Place, Task, compile_static, with_gradients
from maskdm_fast import ops
from maskdm_fast.ops.work import FLOAT, Work


def noise_visible_patches(case: Any, place: Place = HERE) -> Iterator[Task]:
    inputs = place.inputs("noise_visible_patches", case)
    images, ids_keep, alpha, sigma = (inputs[name] for name in ("images", "ids_keep", "alpha", "sigma"))
    side, channels = case.patch_size, case.channels
    rows, columns = case.height // side, case.width // side
    values = side * side * channels

    def ours(eps: Tensor | None = None) -> Outputs:
        return ops.noise_visible_patches(**inputs)

    def diffuse(pixels: Tensor, eps: Tensor | None) -> Outputs:
        x0 = pixels.to(torch.float32) / 127.5 - 1.0
        if eps is None:
            eps = torch.randn_like(x0)
        xt = alpha[:, None, None] * x0 + sigma[:, None, None] * eps
        return xt.to(place.dtype), eps.to(place.dtype)

    def advanced_indexing(eps: Tensor | None = None) -> Outputs:
        grid = images.view(-1, rows, side, columns, side, channels)
        image = torch.arange(images.shape[0], device=images.device)[:, None]
        pixels = grid[image, ids_keep // columns, :, ids_keep % columns]  # [B, K, P, P, C]
        return diffuse(pixels.reshape(-1, ids_keep.shape[1], values), eps)

    def patchify_then_gather(eps: Tensor | None = None) -> Outputs:
        grid = images.view(-1, rows, side, columns, side, channels).transpose(2, 3)
        patches = grid.reshape(-1, rows * columns, values)
        return diffuse(patches.gather(1, ids_keep[:, :, None].expand(-1, -1, values)), eps)

    peers = {"advanced_indexing": advanced_indexing, "patchify_then_gather": patchify_then_gather}
    eps = ours()[1]
    cost = _cost("noise_visible_patches")
    yield Task(
        "noise_visible_patches",
        case.name,
        cost.forward(images.shape[0], ids_keep.numel(), values, images.element_size(), place.item),
        ours,
        peers,
        run=lambda function: function(),
        check=lambda function: function(eps=eps),
        compiled=lambda name: compile_static(peers[name], place.device),
        to_compile=tuple(peers),
    )


def masked_attention(case: Any, place: Place = HERE) -> Iterator[Task]:
    qkv = place.inputs("masked_attention", case)["qkv"]

    def sdpa(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, K, E] each
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    cost = _cost("masked_attention")
    shape = (sum(case.lengths), sum(n * n for n in case.lengths), case.num_heads, case.head_dim, place.item)
    work = cost.forward(*shape) + cost.backward(*shape)
    yield with_gradients("masked_attention", case.name, work, ops.masked_attention, {"sdpa": sdpa}, (qkv,))


def gelu(case: Any, place: Place = HERE) -> Iterator[Task]:
    x = place.inputs("gelu", case)["x"]
    cost = _cost("gelu")
    work = cost.forward(x.numel(), place.item) + cost.backward(x.numel(), place.item)
    yield with_gradients("gelu", case.name, work, ops.gelu, {"gelu": F.gelu}, (x,))


def linear(case: Any, place: Place = HERE) -> Iterator[Task]:
    inputs = place.inputs("linear", case)
    names = [name for name, value in inputs.items() if value is not None]
    leaves = tuple(inputs[name] for name in names)

    def ours(*leaves: Tensor) -> Tensor:
        return ops.linear(**dict(zip(names, leaves, strict=True)))

    def f_linear(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        out = F.linear(given["x"], given["weight"], given.get("bias"))
        return out + given["residual"] if "residual" in given else out

    yield with_gradients("linear", case.name, linear_work(case, place.item), ours, {"F.linear": f_linear}, leaves)


def linear_work(case: Any, item: int = FLOAT) -> Work:
    """Forward and backward of a case of linear, in float32 or in values of `item` bytes."""
    cost, shape = _cost("linear"), (math.prod(case.rows), case.fan_in, case.fan_out, item)
    return cost.forward(*shape, bias=case.bias, residual=case.residual) + cost.backward(*shape, bias=case.bias)


def masked_dsm_loss(case: Any, place: Place = HERE) -> Iterator[Task]:
    inputs = place.inputs("masked_dsm_loss", case)
    pred, target, weight = inputs["pred"], inputs["target"], inputs["weight"]

    def ours(pred: Tensor) -> Tensor:
        return ops.masked_dsm_loss(pred, target, weight)

    def square(pred: Tensor) -> Tensor:
        return ((pred - target).square().mean(dim=(1, 2)) * weight).mean()

    def mse_loss(pred: Tensor) -> Tensor:
        return (F.mse_loss(pred, target, reduction="none").mean(dim=(1, 2)) * weight).mean()

    peers = {"square": square, "mse_loss": mse_loss}
    cost, shape = _cost("masked_dsm_loss"), (pred.shape[0], pred.numel(), place.item)
    work = cost.forward(*shape, weighted=True, mean=True) + cost.backward(*shape, weighted=True, mean=True)
    yield with_gradients("masked_dsm_loss", case.name, work, ours, peers, (pred,), to_compile=("square",))


def sid_loss(case: Any, place: Place = HERE) -> Iterator[Task]:
    inputs = place.inputs("sid_loss", case)
    leaves, alpha = tuple(inputs[name] for name in ("generated", "teacher", "fake")), inputs["alpha"]

    def ours(*leaves: Tensor) -> Tensor:
        return ops.sid_loss(*leaves, alpha=alpha)

    def as_written(generated: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
        """As the formula is written, which keeps an image that is not finite."""
        teacher = teacher.float()
        d, e = teacher - fake, teacher - generated
        size = e.detach().flatten(1).abs().mean(1).clamp(min=1e-5)
        return ((d * (e - alpha * d)).flatten(1).mean(1) / size).mean()

    cost, shape = _cost("sid_loss"), (case.shape[0], leaves[0].numel(), place.item)
    work = cost.forward(*shape, weighted=False, mean=True, of_xt=False) + cost.backward(*shape, mean=True)
    peers = {"as_written": as_written}
    yield with_gradients("sid_loss", case.name, work, ours, peers, leaves, to_compile=("as_written",))


def gather_tokens(case: Any, place: Place = HERE) -> Iterator[Task]:
    inputs = place.inputs("gather_tokens", case)
    x, base, ids_keep = inputs["x"], inputs["base"], inputs["ids_keep"]
    num_images, num_tokens, width = x.shape
    num_visible = ids_keep.shape[1]
    image = torch.arange(num_images, device=x.device)[:, None]

    def flat_ids() -> Tensor:
        return (ids_keep + image * num_tokens).flatten()

    def gather_index_select(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, flat_ids()).view(num_images, num_visible, width)

    def gather_expanded(x: Tensor) -> Tensor:
        return x.gather(1, ids_keep[:, :, None].expand(-1, -1, width))

    def gather_advanced(x: Tensor) -> Tensor:
        return x[image, ids_keep]

    cost, visible, total = _cost("gather_tokens"), ids_keep.numel(), num_images * num_tokens
    kept = x.new_zeros(num_images, num_visible, width)
    with torch.no_grad():
        kept.copy_(gather_index_select(x))
    yield with_gradients(
        "gather_tokens",
        case.name,
        cost.gather(visible, width, place.item) + cost.scatter(visible, total, width, place.item, base=False),
        lambda x: ops.gather_tokens(x, ids_keep),
        {"index_select": gather_index_select, "gather": gather_expanded, "advanced_indexing": gather_advanced},
        (x,),
        to_compile=("index_select",),
    )

    def scatter_index_copy(kept: Tensor, base: Tensor) -> Tensor:
        return base.flatten(0, 1).index_copy(0, flat_ids(), kept.flatten(0, 1)).view(base.shape)

    def scatter_expanded(kept: Tensor, base: Tensor) -> Tensor:
        return base.scatter(1, ids_keep[:, :, None].expand(-1, -1, width), kept)

    def scatter_index_put(kept: Tensor, base: Tensor) -> Tensor:
        return base.index_put((image, ids_keep), kept)

    yield with_gradients(
        "scatter_tokens",
        case.name,
        cost.scatter(visible, total, width, place.item, base=True) + cost.split(visible, total, width, place.item),
        lambda kept, base: ops.scatter_tokens(kept, ids_keep, num_tokens, base),
        {"index_copy": scatter_index_copy, "scatter": scatter_expanded, "index_put": scatter_index_put},
        (kept, base),
        to_compile=("index_copy",),
    )


BUILDERS: dict[str, Callable[..., Iterator[Task]]] = {
    "noise_visible_patches": noise_visible_patches,
    "gather_tokens": gather_tokens,
    "masked_attention": masked_attention,
    "gelu": gelu,
    "linear": linear,
    "masked_dsm_loss": masked_dsm_loss,
    "sid_loss": sid_loss,
    "adamw_ema": adamw_ema,
    "lamb_ema": lamb_ema,
}

# Cases without an element: what is left is the cost of a call.
_EMPTY: dict[str, dict[str, Any]] = {
    "noise_visible_patches": {"num_images": 0},
    "gather_tokens": {"num_images": 0},
    "masked_attention": {"lengths": ()},
    "gelu": {"shape": (0, 4)},
    "linear": {"rows": (0,)},
    "masked_dsm_loss": {"lengths": ()},
    "sid_loss": {"shape": (0, 4)},
    "adamw_ema": {"shapes": ((0,),)},
    "lamb_ema": {"shapes": ((0,),)},
}


def _cases(op: str) -> Any:
    return importlib.import_module(f"maskdm_fast.ops.{op}.cases")


def _cost(op: str) -> Any:
    return importlib.import_module(f"maskdm_fast.ops.{op}.cost")


def benchmark_cases(op: str) -> tuple[Any, ...]:
    """The shapes that `op` is measured on."""
    return _cases(op).BENCHMARKS


def empty_case(op: str) -> Any:
    """The first of them without an element in it."""
    return dataclasses.replace(benchmark_cases(op)[0], name="empty", **_EMPTY[op])
