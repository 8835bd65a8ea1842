"""Measure a whole train step against plain PyTorch and against its bare matrix products: ``python -m benchmarks.step``.

Contestants, which take turns in one process after a check that their losses, gradients and updates agree:

- ours: `DenoisingStage.step`, what training runs;
- plain: the same network from PyTorch's layers, as well written as PyTorch allows (`benchmarks.plain_uvit`);
- compiled: the same under torch.compile;
- official_way: noise, embedding and positions on all patches, boolean indexing, concatenated skips, AdamW as it comes;
- matmul: nothing but the matrix products of the step (Linears, and q k^T and p v of attention, forward and backward).
"""

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.plain_uvit import Draws, PlainStep, PlainUViT
from maskdm_fast import random
from maskdm_fast.diffusion import MaskedObjective, NoMask, PatchMask, make_schedule
from maskdm_fast.models import CONFIGS, UViT, UViTConfig
from maskdm_fast.random import Stream
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, RunConfig
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings, Precision
from maskdm_fast.train.plain_engine import PlainEngine
from maskdm_fast.train.stages import Batch, DenoisingStage
from maskdm_fast.train.world import World

NAMES = ("ours", "plain", "compiled", "official_way", "matmul")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a named model size, the share of masked patches, and images per step."""

    size: str
    mask_ratio: float
    batch: int

    @property
    def model(self) -> UViTConfig:
        return CONFIGS[self.size]

    @property
    def mask(self) -> NoMask | PatchMask:
        return PatchMask(self.mask_ratio) if self.mask_ratio else NoMask()

    @property
    def num_visible(self) -> int:
        side = self.model.image_size // self.model.patch_size
        return self.mask.num_visible((side, side))


CASES = (Case("small64", 0.9, 64), Case("small64", 0.0, 4), Case("emoji32", 0.9, 128), Case("emoji32", 0.0, 64))


def products(case: Case) -> list[tuple[int, int, int, int]]:
    """The matrix products of a step as ``(count, m, k, n)``: count products of an m x k by a k x n matrix."""
    model, batch = case.model, case.batch
    tokens, dim, hidden = case.num_visible + model.num_extras, model.dim, int(model.dim * model.mlp_ratio)
    rows, half = batch * tokens, model.num_blocks // 2

    def linear(count: int, rows: int, fan_in: int, fan_out: int, *, grad_x: bool = True) -> list[tuple[int, ...]]:
        forward, weight = (count, rows, fan_in, fan_out), (count, fan_out, rows, fan_in)
        return [forward, weight] + ([(count, rows, fan_out, fan_in)] if grad_x else [])

    heads, width, blocks = batch * model.num_heads, dim // model.num_heads, model.num_blocks
    attention = [(3 * blocks * heads, tokens, width, tokens), (3 * blocks * heads, tokens, tokens, width)]
    return [
        *linear(1, batch * case.num_visible, model.token_dim, dim, grad_x=False),
        *linear(blocks, rows, dim, 3 * dim),
        *linear(blocks + 2 * half, rows, dim, dim),
        *linear(blocks, rows, dim, hidden),
        *linear(blocks, rows, hidden, dim),
        *linear(1, rows, dim, model.token_dim),
        *attention,
    ]


def flops(case: Case) -> int:
    """Floating point operations of the products of a step."""
    return sum(2 * count * m * k * n for count, m, k, n in products(case))


def matmul_step(case: Case, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """Runs the products of a step on its own operands, in the layouts in which a Linear meets them.

    Weights and activations lie as `nn.Linear` keeps them: forward ``x W^T``, then ``g W`` and ``g^T x``. Every layer
    has its own weight and its own activation, as in a step: neither stays in a cache from one product to the next.
    """
    randn = partial(torch.randn, device=device, dtype=dtype)
    model, batch = case.model, case.batch
    tokens, dim, hidden = case.num_visible + model.num_extras, model.dim, int(model.dim * model.mlp_ratio)
    rows, half = batch * tokens, model.num_blocks // 2
    layers = [(rows, dim, 3 * dim), (rows, dim, dim), (rows, dim, hidden), (rows, hidden, dim)] * model.num_blocks
    layers += [(rows, dim, dim)] * (2 * half) + [(rows, dim, model.token_dim)]
    operands = [tuple(randn(shape) for shape in ((m, k), (n, k), (m, n), (m, n), (m, k), (n, k))) for m, k, n in layers]
    first = [randn(shape) for shape in ((batch * case.num_visible, model.token_dim), (dim, model.token_dim))]
    heads, width = batch * model.num_heads, dim // model.num_heads
    q, scores = randn(heads, tokens, width), randn(heads, tokens, tokens)
    out_q, out_scores = torch.empty_like(q), torch.empty_like(scores)
    embedded, embed_grad = randn(batch * case.num_visible, dim), torch.empty_like(first[1])

    def step() -> None:
        torch.mm(first[0], first[1].t(), out=embedded)
        for x, weight, y, _, _, _ in operands:
            torch.mm(x, weight.t(), out=y)
        for _ in range(model.num_blocks):
            for _ in range(3):
                torch.bmm(q, q.transpose(1, 2), out=out_scores)
                torch.bmm(scores, q, out=out_q)
        for x, weight, _, grad, grad_x, grad_weight in reversed(operands):
            torch.mm(grad, weight, out=grad_x)
            torch.mm(grad.t(), x, out=grad_weight)
        torch.mm(embedded.t(), first[0], out=embed_grad)

    return step


def config(case: Case) -> RunConfig:
    """The run whose steps are measured: eps on the linear schedule, clipping and EMA on, fp32."""
    stage = DenoisingConfig(mask=case.mask, batch_size=case.batch, lr=2e-4, ema_half_life_images=100_000)
    return RunConfig(model=case.model, diffusion=DiffusionConfig(schedule="linear", prediction="eps"), stage=stage)


class Contest:
    """All contestants of one case on one batch of images.

    Args:
        case: network, mask and batch.
        compile_peer: whether the compiled peer takes part.
        device: where they run.
        precision: "fp32", or "bf16" for autocast.
    """

    def __init__(self, case: Case, *, compile_peer: bool = True, device: str = "cpu", precision: Precision = "fp32"):
        self.case, self.config, self.precision = case, config(case), precision
        model, stage = case.model, self.config.stage
        shape = (case.batch, model.image_size, model.image_size, model.channels)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.images, self.slots = images.to(device), torch.arange(case.batch, device=device)
        self.labels = torch.full((case.batch,), -1, device=device)
        settings = OptimizerSettings(stage.betas, stage.weight_decay, stage.max_grad_norm, stage.ema_decay)
        world = World(torch.device(device))
        self.engine = PlainEngine(UViT(model), settings, EngineSettings(precision), world)
        self._stage, self._num_steps = DenoisingStage(self.config, self.engine, world), 0
        ways = {"plain": {}, "compiled": {"compile": True}, "official_way": {"official": True}}
        self.peers = {
            name: PlainStep(self.engine.model, make_schedule("linear"), case.num_visible, stage, **options)
            for name, options in ways.items()
            if compile_peer or name != "compiled"
        }

    def ours(self) -> None:
        """One step of training."""
        batch = Batch(self.images, self.labels, self.slots)
        self._stage.step([batch], self._num_steps)
        self._num_steps += 1

    def check_parity(self) -> None:
        """Raise AssertionError unless every peer has our loss and our gradients, given our draws, and makes of equal
        gradients the weights and averages that ours makes. All of them are two steps further then."""
        model, mask = self.case.model, self.case.mask
        draw = {"seed": self.config.seed, "step": 0, "slots": self.slots}
        objective = MaskedObjective(make_schedule("linear"), mask, model.patch_size)
        out = objective(self.engine.model, self.images, None, **draw)
        out["loss"].backward()
        side = model.image_size // model.patch_size
        eps = random.normal(model.num_tokens * model.token_dim, stream=Stream.NOISE, **draw)
        draws = Draws(out["t"], mask.sample((side, side), **draw), eps.view(self.case.batch, -1, model.token_dim))
        for name, peer in self.peers.items():
            pairs = [("loss", peer.gradients(self.images, draws), out["loss"].detach())]
            pairs += [
                (f"gradient {i}", *pair) for i, pair in enumerate(peer.network.pairs(self.engine.model, grad=True))
            ]
            for what, have, want in pairs:
                # Sums over all tokens in another order: held to a share of the largest element, not of each.
                atol = 1e-3 * want.abs().max().item()
                message = f"{self.case}, {name}, {what}: "
                torch.testing.assert_close(have, want, rtol=1e-3, atol=atol, msg=lambda text, m=message: m + text)
        self._check_updates({name: param.grad.clone() for name, param in self.engine.model.named_parameters()})

    def _check_updates(self, gradients: dict[str, Tensor]) -> None:
        """One update of gradients within the largest norm, and one far beyond, which shows where it is not cut."""
        model, stage = self.engine.model, self.config.stage
        norm = torch.nn.utils.get_total_norm(gradients.values())
        for share in (0.5, 20.0):
            scaled = {name: grad * (share * stage.max_grad_norm / norm) for name, grad in gradients.items()}
            for name, param in model.named_parameters():
                param.grad = scaled[name]
            for peer in self.peers.values():
                for param, grad in zip(peer.params, self._laid_out(peer, scaled), strict=True):
                    param.grad = grad
                peer.update()
            self.engine.step(stage.lr)
        for name, peer in self.peers.items():
            for what, have, values in (
                ("weight", peer.params, model.state_dict()),
                ("average", peer.emas, self.engine.averaged()),
            ):
                for i, pair in enumerate(zip(have, self._laid_out(peer, values), strict=True)):
                    # A share of the step, which is far less than the weight.
                    message = f"{self.case}, {name}, {what} {i}: "
                    torch.testing.assert_close(
                        *pair, rtol=0.0, atol=1e-2 * stage.lr, msg=lambda text, m=message: m + text
                    )

    def _laid_out(self, peer: PlainStep, values: dict[str, Tensor]) -> list[Tensor]:
        """What stands for our parameters, by name, in the order and the shapes of those of a peer."""
        model = copy.deepcopy(self.engine.model)
        model.load_state_dict({**model.state_dict(), **values})
        return [param.detach() for param in PlainUViT(model, official=peer.official).parameters()]

    def functions(self) -> dict[str, Callable[[], Any]]:
        """What is timed, by name."""
        peers = {name: partial(self._run_peer, peer) for name, peer in self.peers.items()}
        device, dtype = self.images.device.type, {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]
        return {"ours": self.ours, **peers, "matmul": matmul_step(self.case, device=device, dtype=dtype)}

    def _run_peer(self, peer: PlainStep) -> None:
        with self.engine.autocast():
            peer(self.images)


def measure(case: Case, *, repeats: int, compile_peer: bool = True) -> dict[str, Any]:
    """One row: ``{size, mask_ratio, batch, gflop, ms}``, ms by `NAMES`, None for a peer that was left out."""
    torch._dynamo.reset()
    contest = Contest(case, compile_peer=compile_peer)
    contest.check_parity()
    times = harness.interleave(contest.functions(), repeats)
    milliseconds = {name: round(times[name], 3) if name in times else None for name in NAMES}
    return {**dataclasses.asdict(case), "gflop": round(flops(case) * 1e-9, 2), "ms": milliseconds}


def add_efficiency(rows: list[dict[str, Any]]) -> None:
    """Add ``masking_efficiency`` to the masked rows whose size has an unmasked one, None to all others.

    (dense step / masked step) / (dense FLOPs / masked FLOPs), time and FLOPs per image: 1 where masking saves as much
    time as arithmetic.
    """
    dense = {row["size"]: row for row in rows if row["mask_ratio"] == 0}

    def rate(row: dict[str, Any]) -> float:
        return row["gflop"] / row["ms"]["ours"]

    for row in rows:
        masked = row["mask_ratio"] > 0 and row["size"] in dense
        row["masking_efficiency"] = round(rate(row) / rate(dense[row["size"]]), 3) if masked else None


def table(result: dict[str, Any]) -> str:
    """`result` for people."""
    lines = [
        f"{'size':<10}{'masked':>7}{'batch':>6}" + "".join(f"{name:>14}" for name in NAMES) + f"{'efficiency':>12}"
    ]
    for row in result["rows"]:
        times = row["ms"]
        cells = "".join(
            f"{times[name]:8.1f} {times[name] / times['matmul']:4.2f}x" if times[name] else f"{'-':>14}"
            for name in NAMES
        )
        lines.append(
            f"{row['size']:<10}{row['mask_ratio']:>7.0%}{row['batch']:>6}{cells}{row['masking_efficiency'] or '-':>12}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = harness.command_line("step", __doc__, repeats=11)
    parser.add_argument("--size", choices=sorted({case.size for case in CASES}), help="only this size")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled peer out (it takes minutes)")
    options = harness.prepare(parser, arguments)
    harness.refuse_to_save_a_part(parser, options, "size", "no_compile")
    result = harness.environment()
    cases = [case for case in CASES if options.size in (None, case.size)]
    result["rows"] = []
    for case in cases:
        result["rows"].append(measure(case, repeats=options.repeats, compile_peer=not options.no_compile))
        print(result["rows"][-1], file=sys.stderr, flush=True)
    add_efficiency(result["rows"])
    if options.save:
        harness.save(result, "step")
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
