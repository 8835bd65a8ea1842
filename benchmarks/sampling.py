"""Measure 50 steps of DDIM against the same loop in plain PyTorch: ``python -m benchmarks.sampling``."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.plain_uvit import PlainUViT
from maskdm_fast import random
from maskdm_fast.diffusion import Denoiser, linear_schedule, sample, unpatchify
from maskdm_fast.models import CONFIGS, UViT
from maskdm_fast.random import Stream

_SEED = 0


def plain_ddim(model: PlainUViT, num_images: int, num_steps: int, network: Callable) -> Callable[[], Tensor]:
    """DDIM as it is usually written: alphas indexed at every step, eps and x0 as tensors, ``torch.randn``.

    Returns:
        A function from the first noise ``[B, N, P*P*C]`` (None: it is drawn) to uint8 images ``[B, h, w, C]``.
    """
    config, schedule = model.config, linear_schedule()
    alpha_bar = torch.cat((schedule.alpha_bar.to(torch.float32), torch.ones(1)))  # the last is that of time -1
    times = [*schedule.sampling_times(num_steps), -1]
    shape = (num_images, config.num_tokens, config.token_dim)

    @torch.inference_mode()
    def run(noise: Tensor | None = None) -> Tensor:
        x = torch.randn(shape) if noise is None else noise
        for now, then in itertools.pairwise(times):
            a, b = alpha_bar[now], alpha_bar[then]
            eps = network(x, torch.full((num_images,), now), None)
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
            x = b.sqrt() * x0 + (1 - b).sqrt() * eps
        pixels = unpatchify(x, config.patch_size, config.image_size, config.image_size, config.channels)
        return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    return run


def measure(size: str, *, num_images: int, num_steps: int, repeats: int, compile_peer: bool = True) -> dict[str, Any]:
    """One row, after a check that all draw the same images from the same noise up to one grey level.

    Returns:
        ``{size, num_images, num_steps, ms: {ours, plain, compiled}}``.
    """
    config = CONFIGS[size]
    model = UViT(config)
    plain = PlainUViT(model, official=False).eval()
    denoiser = Denoiser(model, linear_schedule(), "eps")

    def ours() -> Tensor:
        return sample(
            denoiser,
            num_images=num_images,
            image_size=config.image_size,
            channels=config.channels,
            patch_size=config.patch_size,
            num_steps=num_steps,
            seed=_SEED,
            batch_size=num_images,
        )

    peers = {"plain": plain_ddim(plain, num_images, num_steps, plain)}
    if compile_peer:
        torch._dynamo.reset()
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        peers["compiled"] = plain_ddim(plain, num_images, num_steps, compiled)
    values, slots = config.num_tokens * config.token_dim, torch.arange(num_images)
    noise = random.normal(values, seed=_SEED, stream=Stream.GENERATOR_NOISE, step=0, slots=slots)
    noise = noise.view(num_images, config.num_tokens, config.token_dim)
    # Sampling starts from sigma_T z, which plain code takes for z.
    noise = noise * math.sqrt(1 - float(linear_schedule().alpha_bar[-1]))
    want = ours().to(torch.int16)
    for name, peer in peers.items():
        apart = (peer(noise).to(torch.int16) - want).abs().max().item()
        if apart > 1:
            raise AssertionError(f"{name}: images differ from ours by {apart} grey levels")
    times = harness.interleave({"ours": ours, **peers}, repeats)
    milliseconds = {name: round(time, 2) for name, time in times.items()}
    return {"size": size, "num_images": num_images, "num_steps": num_steps, "ms": milliseconds}


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = harness.command_line("sampling", __doc__, repeats=7)
    options = harness.prepare(parser, arguments)
    result = harness.environment()
    result["rows"] = [measure("emoji32", num_images=64, num_steps=50, repeats=options.repeats)]
    if options.save:
        harness.save(result, "sampling")
    if options.json:
        print(json.dumps(result))
        return
    for row in result["rows"]:
        times = row["ms"]
        ratios = ", ".join(f"{name} {time:.0f} ms ({time / times['ours']:.2f} x)" for name, time in times.items())
        print(f"{row['num_images']} images of {row['size']}, {row['num_steps']} steps of DDIM: {ratios}")


if __name__ == "__main__":
    main()
